"""Frechet distances: the feature, the refusal of few samples, closed forms (P23), and features of one's own."""

import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from ditq_converters.evaluate import inception, judges
from ditq_converters.evaluate.features import (
    checked_features,
    frechet,
    latent_pool4,
    load_features,
)
from ditq_converters.evaluate.scores import Judges


def gaussian(samples, dimension, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, dimension, generator=generator, dtype=torch.float64)


def test_latents_are_averaged_to_four_by_four_cells():
    latents = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    features = latent_pool4(latents)
    assert features.shape == (2, 48)
    assert features.dtype == torch.float64
    assert float(features[0, 0]) == latents[0, 0, :2, :2].mean()
    assert float(features[1, 47]) == latents[1, 2, 6:, 6:].mean()


@pytest.mark.parity("P23")
def test_the_distance_to_itself_is_zero():
    x = gaussian(200, 8, 0)
    # roots of 8 eigenvalues, each exact to 1e-15 of about 1
    assert frechet("x", x, x)["value"] == pytest.approx(0, abs=1e-10)


@pytest.mark.parity("P23")
def test_diagonal_gaussians_follow_the_closed_form():
    """Whitened samples have the covariance asked for exactly: |dm|^2 + sum (sqrt v1 - sqrt v2)^2 = 9 + 1 + 4."""
    x = gaussian(100, 3, 1)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    a = white * torch.tensor([1.0, 3, 2]).double()
    b = white * torch.tensor([2.0, 1, 2]).double() + torch.tensor([3.0, 0, 0]).double()
    found = frechet("x", a, b)
    assert found["value"] == pytest.approx(14, rel=1e-9)
    assert found["name"] == "FD-x"
    assert (found["samples"], found["dimension"], found["warning"]) == (100, 3, None)


@pytest.mark.parity("P23")
def test_the_distance_equals_scipys_matrix_root():
    a, b = gaussian(300, 5, 2) @ gaussian(5, 5, 3), gaussian(300, 5, 4) @ gaussian(5, 5, 5) + 0.5
    covariances = [np.cov(f.numpy(), rowvar=False) for f in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = float((a.mean(0) - b.mean(0)).square().sum())
    expected = shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet("x", a, b)["value"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("samples", "given"), [(2, False), (80, False), (81, True)])
def test_few_samples_give_a_warning_and_no_number(samples, given):
    found = frechet("x", gaussian(samples, 8, 6), gaussian(samples, 8, 7))
    assert (found["value"] is not None) == given
    assert (found["warning"] is None) == given
    if not given:
        assert f"need at least 81, got {samples}" in found["warning"]


def test_features_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine_for_ditq.py").write_text(
        "def corner(images):\n    return images[:, :, 0, 0]\n"
        "def wrong(images):\n    return images\n"
        "table = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    images = torch.rand(4, 3, 8, 8)
    name, corner = load_features("mine_for_ditq:corner")
    assert name == "corner"
    assert torch.equal(checked_features(name, corner, images), images[:, :, 0, 0])
    with pytest.raises(ValueError, match=r"must return a tensor \[4, D\], got \(4, 3, 8, 8\)"):
        checked_features(*load_features("mine_for_ditq:wrong"), images)
    with pytest.raises(ValueError, match="is no function but a int"):
        load_features("mine_for_ditq:table")
    with pytest.raises(ValueError, match="cannot be imported"):
        load_features("mine_for_ditq:nothing")
    with pytest.raises(ValueError, match="cannot be imported"):
        load_features("no_such_module_for_ditq:f")
    with pytest.raises(ValueError, match="expected module:function"):
        load_features("mine_for_ditq")


def test_missing_packages_are_one_sentence(monkeypatch):
    for name in ("torchvision", "torchmetrics", "torch_fidelity"):
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    for load, package in (
        (judges.load_lpips, "torchmetrics"),
        (inception.load_inception, "torch-fidelity"),
    ):
        with pytest.raises(
            ImportError, match=rf"{package}.*not .*installed.*ditq\[eval\]"
        ) as error:
            load()
        assert "\n" not in str(error.value)


def test_judging_images_needs_a_vae(make_dit):
    with pytest.raises(ValueError, match="judge images"):
        Judges.load("", True, False, make_dit())


def test_images_as_bytes():
    images = torch.tensor([-1.5, -1, 0, 0.5, 1, 2]).reshape(1, 1, 1, 6)
    # 127.5 is a tie and goes to the even 128; 191.25
    assert judges.to_uint8(images).flatten().tolist() == [0, 0, 128, 191, 255, 255]
    assert judges.rgb(images).shape == (1, 3, 1, 6)
    assert judges.rgb(images.expand(1, 3, 1, 6)).shape == (1, 3, 1, 6)

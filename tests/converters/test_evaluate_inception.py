"""FD, sFD, Inception score, precision and recall by torch-fidelity; its network replaced, or with random weights."""

import math
from urllib.error import URLError

import pytest
import torch
from torch import nn

from ditq_converters.evaluate import judges
from ditq_converters.evaluate.features import frechet
from ditq_converters.evaluate.inception import (
    FEWEST,
    SPATIAL_CHANNELS,
    InceptionFeatures,
    inception_features,
    inception_scores,
    load_inception,
)


class Block(nn.Module):
    """The one branch that sFD listens to; 9 channels, so that too many are noticed."""

    def __init__(self):
        super().__init__()
        self.branch1x1 = nn.Conv2d(3, 9, 1)

    def forward(self, x):
        return self.branch1x1(x)


class SmallInception(nn.Module):
    """Takes bytes [S, 3, H, W] and returns features and logits, as torch-fidelity's network does."""

    def __init__(self):
        super().__init__()
        self.Mixed_6d = Block()

    def forward(self, x):
        assert x.dtype == torch.uint8
        pooled = self.Mixed_6d(x.float()).mean((2, 3))
        return pooled, pooled.flip(1)


def test_features_are_those_of_all_batches_in_order():
    torch.manual_seed(0)
    network, images = SmallInception(), torch.rand(70, 1, 4, 4) * 2 - 1
    found = inception_features(network, images)
    with torch.no_grad():
        whole = network.Mixed_6d.branch1x1(judges.to_uint8(images.expand(-1, 3, -1, -1)).float())
    assert torch.allclose(found.pool, whole.mean((2, 3)), rtol=1e-5, atol=1e-4)
    assert torch.equal(found.logits, found.pool.flip(1))
    assert found.spatial.shape == (70, SPATIAL_CHANNELS * 16)
    assert torch.allclose(found.spatial, whole[:, :7].flatten(1), rtol=1e-5, atol=1e-4)
    assert not network.Mixed_6d.branch1x1._forward_hooks


def test_published_counts_give_a_number_and_fewer_a_warning():
    draw = torch.Generator().manual_seed(1)
    many = torch.randn(FEWEST, 600, generator=draw, dtype=torch.float64)
    assert frechet("x", many[:400], many[400:800], 401)["value"] is None
    assert frechet("x", many[:, :4], many[:, :4] + 2, FEWEST)["value"] == pytest.approx(
        16, rel=1e-9
    )
    assert (
        frechet("x", many, many)["value"] is None
    )  # without the convention, 600 dimensions need 6001


def test_missing_weights_say_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline():
        with judges.cached_weights("--fid", "weights.pth"):
            raise URLError("no route to host")

    with pytest.raises(FileNotFoundError, match=r"--fid needs .* weights\.pth") as error:
        offline()
    assert str(tmp_path / "checkpoints") in str(error.value)
    assert "\n" not in str(error.value)


def test_scores_are_the_formulas():
    pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError))
    draw = torch.Generator().manual_seed(2)
    pool, logits = (
        torch.randn(400, 3, generator=draw, dtype=torch.float64),
        torch.randn(400, 5, generator=draw),
    )
    one = InceptionFeatures(pool, pool, logits)
    far = InceptionFeatures(pool + 100, pool, logits)
    same, apart = inception_scores(one, one), inception_scores(one, far)
    assert (same["precision"], same["recall"]) == (1, 1)
    assert (apart["precision"], apart["recall"]) == (0, 0)
    # exp E KL(p(y|x) || p(y)), about: the ten splits see 40 samples each
    p = logits.double().softmax(1)
    whole = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp()
    assert same["inception_score"]["float"] == pytest.approx(float(whole), rel=0.05)
    certain = InceptionFeatures(pool, pool, 1000.0 * torch.eye(5)[torch.arange(400) % 5])
    # five certain classes give 5, less the bias of an entropy of 40 draws, (5 - 1) / (2 * 40)
    expected = 5 * math.exp(-4 / 80)
    found = inception_scores(one, certain)["inception_score"]["packed"]
    assert found == pytest.approx(expected, rel=0.02)
    few = InceptionFeatures(pool[:3], pool[:3], logits[:3])
    assert inception_scores(few, few)["precision"] is None


def test_the_real_network_with_random_weights(monkeypatch):
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", exc_type=(ImportError, RuntimeError)
    )
    network = module.FeatureExtractorInceptionV3
    monkeypatch.setattr(network, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda url, **options: {})
    torch.manual_seed(0)
    found = load_inception()(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert found.pool.shape == (2, 2048)
    assert found.spatial.shape == (2, 2023)  # 7 channels of 17 x 17
    assert found.logits.shape == (2, 1008)

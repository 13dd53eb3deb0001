"""The real digits and their split."""

import sys

import pytest
import torch
from sklearn.datasets import load_digits as load_sklearn_digits

from ditq_converters.demo.digits import load_digits


def test_the_split_is_a_partition_of_all_digits():
    train, held_out = load_digits()
    assert train.images.shape == (1500, 1, 8, 8)
    assert held_out.images.shape == (297, 1, 8, 8)
    assert train.images.dtype == torch.float32

    raw = load_sklearn_digits()
    expected = sorted((*pixels, n) for pixels, n in zip(raw.data, raw.target, strict=True))
    images = (torch.cat([train.images, held_out.images]) + 1) * 8
    labels = torch.cat([train.labels, held_out.labels])
    pixels = images.flatten(1).tolist()
    assert sorted((*row, n) for row, n in zip(pixels, labels.tolist(), strict=True)) == expected


def test_pixels_span_minus_one_to_one():
    train, _ = load_digits()
    assert (train.images.min(), train.images.max()) == (-1, 1)


def test_the_split_is_the_same_every_time_and_leaves_the_global_seed_alone():
    torch.manual_seed(5)
    first, _ = load_digits()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    second, _ = load_digits()
    assert torch.equal(first.images, second.images)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"ditq\[train\]"):
        load_digits()

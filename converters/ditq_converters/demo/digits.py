"""The demo's real data: scikit-learn's 1797 handwritten digits of 8x8 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DIGIT_NAMES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip
HELD_OUT = 297
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Images with their labels.

    Attributes:
        images: [N, 1, 8, 8] fp32 in [-1, 1]; -1 is the dark background.
        labels: [N] int64 in 0..9.
    """

    images: torch.Tensor
    labels: torch.Tensor


def load_digits() -> tuple[Digits, Digits]:
    """Load the digits, split once and for all into training and held-out images.

    Pixels are counts 0..16, mapped to x / 8 - 1. The split is a permutation with a fixed seed, so
    that the transformer, the classifier and every later comparison agree on what was held out.

    Returns:
        The training digits (1500) and the held-out digits (297).

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load_sklearn_digits
    except ImportError as error:
        raise ImportError(
            "load_digits: training the demo needs scikit-learn; run `pip install 'ditq[train]'`"
        ) from error
    raw = load_sklearn_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 8 - 1  # [N, 1, 8, 8]
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])

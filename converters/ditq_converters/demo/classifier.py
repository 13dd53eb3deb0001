"""The judge of demo samples: a small digit CNN whose features also give a Frechet distance.

Its figures are meant for comparing demo models with each other. `digit_fd` is no FID: other
features, other images, other scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ditq_converters.demo.bundle import CLASSIFIER_FILE, load_asset, save_asset
from ditq_converters.demo.frechet import FeatureStatistics, feature_statistics, frechet_distance

FEATURES = 64
IMAGE_SIZE = 8


class DigitClassifier(nn.Module):
    """Three 3x3 convolutions and two linears: 73k parameters."""

    def __init__(self) -> None:
        """Build with torch's random weights (fp32)."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 2 * 2, FEATURES)
        self.dropout = nn.Dropout(0.2)
        self.output = nn.Linear(FEATURES, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [N, 1, 8, 8] in [-1, 1] to features [N, 64], not negative."""
        x = F.relu(self.conv1(images))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # [N, 64, 4, 4]
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)  # [N, 64, 2, 2]
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [N, 1, 8, 8] in [-1, 1] to class logits [N, 10]."""
        return self.output(self.dropout(self.features(images)))


@dataclass(frozen=True)
class Score:
    """How good a set of demo samples is.

    Attributes:
        accuracy: share of images that are taken for the digit that was asked for.
        mean_probability: mean probability given to the digit that was asked for.
        digit_fd: Frechet distance to the 1500 training digits on the classifier's 64 features.
            It grows as N shrinks: compare at equal N only, best with N over 640.
    """

    accuracy: float
    mean_probability: float
    digit_fd: float


def save_classifier(
    path: Path,
    classifier: DigitClassifier,
    real: FeatureStatistics,
    metadata: dict[str, str],
) -> None:
    """Write the classifier and the real digits' feature statistics to one file, atomically."""
    statistics = {"real.mean": real.mean, "real.covariance": real.covariance}
    save_asset(path, classifier.state_dict() | statistics, metadata)


def load_classifier(folder: Path | None = None) -> tuple[DigitClassifier, FeatureStatistics]:
    """Load the classifier (eval mode) and the feature statistics of the training digits.

    Args:
        folder: where to look; by default the assets that are installed with this package.
    """
    tensors = load_asset(CLASSIFIER_FILE, folder)
    real = FeatureStatistics(tensors.pop("real.mean"), tensors.pop("real.covariance"))
    classifier = DigitClassifier()
    classifier.load_state_dict(tensors)
    return classifier.eval(), real


_packaged_classifier = lru_cache(maxsize=1)(load_classifier)


@torch.no_grad()
def score(images: torch.Tensor, labels: torch.Tensor) -> Score:
    """Score demo samples with the packaged classifier, on the CPU.

    Args:
        images: [N, 1, 8, 8] float in [-1, 1]: the model's latents; or [N, 1, 32, 32] float in
            [-1, 1]: those decoded by the demo's VAE, of which every fourth pixel is taken. A
            pipeline's "pt" and "np" images lie in [0, 1]: give 2 x - 1. N >= 2.
        labels: [N] integers in 0..9: the digits that were asked for.

    Raises:
        ValueError: the shapes do not fit.
    """
    side = images.shape[-1] if images.ndim == 4 else 0
    if side not in (IMAGE_SIZE, 4 * IMAGE_SIZE) or images.shape[1:] != (1, side, side):
        raise ValueError(f"score: images must be [N,1,8,8] or [N,1,32,32], got {images.shape}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"score: {len(images)} images need as many labels, got {labels.shape}")
    stride = side // IMAGE_SIZE
    images = images[:, :, ::stride, ::stride].detach().cpu().float().clamp(-1, 1)
    labels = labels.cpu().long()

    classifier, real = _packaged_classifier()
    features = classifier.features(images)
    probabilities = classifier.output(features).softmax(dim=1)
    return Score(
        accuracy=(probabilities.argmax(1) == labels).double().mean().item(),
        mean_probability=probabilities.gather(1, labels[:, None]).double().mean().item(),
        digit_fd=frechet_distance(feature_statistics(features), real),
    )

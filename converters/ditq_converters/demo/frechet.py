"""The Frechet distance between two sets of features, in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FeatureStatistics:
    """A Gaussian fitted to features.

    Attributes:
        mean: [D] fp64.
        covariance: [D, D] fp64, unbiased.
    """

    mean: torch.Tensor
    covariance: torch.Tensor


def feature_statistics(features: torch.Tensor) -> FeatureStatistics:
    """Fit mean and unbiased covariance.

    Args:
        features: [N, D] float, N >= 2.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"feature_statistics: needs at least 2 samples, got {len(features)}")
    features = features.double()
    return FeatureStatistics(features.mean(0), torch.cov(features.T))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (arXiv:1706.08500, Eq. 6).

    The trace of the root is the sum of the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2),
    which is symmetric and has the eigenvalues of S_a S_b; rounding below zero is clipped.
    The estimate is biased upwards by few samples: compare at equal N only.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # S_a^(1/2)
    product = torch.linalg.eigvalsh(root @ b.covariance @ root)
    trace_of_root = product.clamp_min(0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * trace_of_root
    return max(0.0, distance.item())

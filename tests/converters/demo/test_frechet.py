"""The Frechet distance against closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch

from ditq_converters.demo.frechet import FeatureStatistics, feature_statistics, frechet_distance


def test_the_distance_of_diagonal_gaussians_is_the_closed_form():
    # |m_a - m_b|^2 + sum (sqrt(v_a) - sqrt(v_b))^2 = (9 + 16) + (1 + 4 + 0)
    a = FeatureStatistics(
        torch.tensor([0.0, 0, 0], dtype=torch.float64),
        torch.diag(torch.tensor([1.0, 9, 4], dtype=torch.float64)),
    )
    b = FeatureStatistics(
        torch.tensor([3.0, 4, 0], dtype=torch.float64),
        torch.diag(torch.tensor([4.0, 1, 4], dtype=torch.float64)),
    )
    assert frechet_distance(a, b) == pytest.approx(30, rel=1e-12)


def test_the_distance_of_correlated_gaussians_equals_scipys_matrix_root():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 200, 5, generator=generator, dtype=torch.float64)
    first, second = noise[0] @ mixing[0], noise[1] @ mixing[1] + 1
    covariances = [np.cov(features.numpy(), rowvar=False) for features in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = (first.mean(0) - second.mean(0)).square().sum().item()
    expected = shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    distance = frechet_distance(feature_statistics(first), feature_statistics(second))
    assert distance == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("samples", [3, 100])  # fewer than features: singular; and regular
def test_the_distance_of_a_set_to_itself_is_zero(samples):
    features = torch.randn(samples, 8, generator=torch.Generator().manual_seed(1)).relu()
    statistics = feature_statistics(features)
    # roots of eigenvalues that should be 0 and are 1e-16: 8 of 1e-8
    assert 0 <= frechet_distance(statistics, statistics) < 2e-7
    moved = feature_statistics(features + 1)
    assert frechet_distance(statistics, moved) == pytest.approx(8, abs=1e-5)


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        feature_statistics(torch.zeros(1, 4))

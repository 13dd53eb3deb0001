"""PSNR, SSIM and relative L2 against hand-worked numbers and an independent SSIM."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from ditq_converters.evaluate.paired import pooled_psnr_db, psnr_db, relative_l2, ssim


def pair(shape, noise=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    return x, (x + noise * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(
        -1, 1
    )


def scipy_ssim(x, y):
    """SSIM of two [H, W] arrays in [0, 1] with scipy's correlation, cut to windows inside the image."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(a):
        return correlate1d(correlate1d(a, window, axis=0), window, axis=1)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.0001, 0.0009
    above = (2 * mx * my + c1) * (2 * cov + c2)
    return (above / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


@pytest.mark.parametrize("shape", [(1, 1, 11, 11), (2, 3, 32, 27), (3, 1, 12, 40)])
def test_ssim_equals_scipys(shape):
    x, y = pair(shape)
    expected = [
        np.mean(
            [
                scipy_ssim(a.numpy() / 2 + 0.5, b.numpy() / 2 + 0.5)
                for a, b in zip(one, other, strict=True)
            ]
        )
        for one, other in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(ssim(x, y).numpy(), expected, rtol=1e-10)


def test_ssim_of_equal_images_is_one_and_of_a_negative_is_negative():
    x, _ = pair((2, 1, 16, 16))
    torch.testing.assert_close(ssim(x, x), torch.ones(2).double(), rtol=1e-12, atol=0)
    assert bool((ssim(x, -x) < 0).all())


def test_ssim_of_constant_images_by_hand():
    """No structure: (2 a b + C1) / (a^2 + b^2 + C1), where 0.5 and -0.5 are grey levels 0.75 and 0.25."""
    a, b = torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), -0.5)
    expected = (2 * 0.1875 + 0.0001) / (0.5625 + 0.0625 + 0.0001)
    assert float(ssim(a, b)) == pytest.approx(expected, rel=1e-6)


def test_psnr_by_hand():
    """Errors of 0.2 and 0.02 everywhere, peak 2: 20 and 40 dB each; pooled 4 / 0.0202 = 198.02, so 22.97 dB."""
    x = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    y = x + torch.tensor([0.2, 0.02]).double().reshape(2, 1, 1, 1)
    torch.testing.assert_close(
        psnr_db(x, y), torch.tensor([20.0, 40.0]).double(), rtol=1e-6, atol=0
    )
    assert pooled_psnr_db(x, y) == pytest.approx(10 * math.log10(4 / 0.0202), abs=1e-6)
    assert bool(psnr_db(x, x).isinf().all())


def test_relative_l2_is_the_ratio_of_norms():
    x = torch.ones(2, 1, 3, 3)
    assert relative_l2(x, x * 1.25) == pytest.approx(0.25)
    assert relative_l2(x, x) == 0


def test_shapes_that_do_not_fit_are_refused():
    x = torch.zeros(1, 1, 16, 16)
    for measure in (psnr_db, ssim, relative_l2):
        with pytest.raises(ValueError, match="two equal shapes"):
            measure(x, x[..., :15])
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(x[..., :10], x[..., :10])

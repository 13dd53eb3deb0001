"""The identity VAE is one."""

import pytest
import torch

from ditq_converters.demo import identity_vae
from ditq_converters.demo.identity_vae import CONSTANT, build_identity_vae


def _images(dtype):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(6, 1, 8, 8, generator=generator) * 2 - 1
    extremes = torch.stack([torch.ones(1, 8, 8), -torch.ones(1, 8, 8), torch.zeros(1, 8, 8)])
    return torch.cat([noise, noise.sign(), extremes]).to(dtype)


def _enlarge(x):
    return x.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


# Where |x| <= 1, the statistics cost x / (2 C^2) < 2e-6, and the norm's eps (1e-6) 2e-6 / C^2 of x.
# In 16 bits four roundings dominate: the norm's output, silu(x) and the result by half an ulp below
# 1 each, silu(-x), which is smaller than 0.28, by half of that.
STATISTICS = (1 / 2 + 2e-6) / CONSTANT**2
BOUNDS = [
    (torch.float64, STATISTICS + 1e-13),
    (torch.float32, 2 * STATISTICS),  # as much again for the rounded mean of numbers like C
    (torch.bfloat16, 3.5 * 2**-9 + STATISTICS),
    (torch.float16, 3.5 * 2**-12 + STATISTICS),
]


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@torch.no_grad()
def test_decode_enlarges_by_nearest_neighbour(dtype, bound):
    x = _images(dtype)
    decoded = _build(dtype).decode(x).sample
    assert decoded.dtype == dtype
    assert (decoded - _enlarge(x)).abs().max() <= bound


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@torch.no_grad()
def test_encode_takes_every_fourth_pixel(dtype, bound):
    x = _images(dtype)
    posterior = _build(dtype).encode(_enlarge(x)).latent_dist
    assert (posterior.mode() - x).abs().max() <= bound
    assert posterior.std.max() < 1e-6


def _build(dtype):
    vae = build_identity_vae()
    for parameter in vae.parameters():  # as `vae.to(dtype)`, which warns in diffusers 0.42
        parameter.data = parameter.data.to(dtype)
    return vae


@torch.no_grad()
def test_the_frozen_statistics_are_what_makes_it_an_identity(monkeypatch):
    monkeypatch.setattr(identity_vae, "CONSTANT", 1.0)
    x = _images(torch.float32)
    assert (build_identity_vae().decode(x).sample - _enlarge(x)).abs().max() > 0.1


def test_latents_are_not_rescaled():
    assert build_identity_vae().config.scaling_factor == 1

"""Plants outlier channels, and asymmetric ones, into a DiT without changing its function.

The digits model has no salient channels of its own (the largest channel's range is 3 to 6 times
the median's), so it cannot tell a method that handles them from one that does not. Real DiTs have
them. Here a few channels of each activation are multiplied, a few divided, and the next linear's
columns get the inverse: the same function, with activations that are hard to quantize.

This is exactly the inverse of smoothing (SmoothQuant, arXiv:2211.10438, Eq. 3). A smoothing method
undoes it by construction; that it wins here shows that it is implemented right, and nothing about
its rank on a real DiT.

`plant_asymmetry` also adds a constant to some channels, through the bias of whatever makes them, and
takes its product with the weight out of the next bias. Real DiTs have such channels too, and a
factor cannot undo them; a channel shift (HTG, Eq. 2) does, by construction again.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

SEED = 20


def _draw_factors(
    width: int, up: float, down: float, channels: int, rng: random.Random
) -> torch.Tensor:
    """Draw [width] fp64: `channels` factors above 1, as many below, the rest 1."""
    # only `Random.random()` promises the same numbers in every Python version
    order = sorted(range(width), key=lambda _: rng.random())
    factors = torch.ones(width, dtype=torch.float64)
    for channel in order[:channels]:
        factors[channel] = up * (0.5 + rng.random())
    for channel in order[channels : 2 * channels]:
        factors[channel] = 1 / (down * (0.5 + rng.random()))
    return factors


def _divide_columns(linears: Iterable[nn.Linear], factors: torch.Tensor) -> None:
    """Let linears take inputs that were multiplied by `factors` [K]."""
    for linear in linears:
        linear.weight.copy_(linear.weight.double() / factors)  # copy_ casts back


def _multiply_rows(linear: nn.Linear, rows: slice, factors: torch.Tensor) -> None:
    """Multiply some of a linear's outputs."""
    linear.weight[rows] = (linear.weight[rows].double() * factors[:, None]).to(linear.weight.dtype)
    linear.bias[rows] = (linear.bias[rows].double() * factors).to(linear.bias.dtype)


def _multiply_modulated(
    modulation: nn.Linear, shift_chunk: int, scale_chunk: int, factors: torch.Tensor
) -> None:
    """Multiply `norm(x) * (1 + adaln_scale) + adaln_shift` by `factors`, through the modulation.

    f * (1 + scale) = 1 + (f * scale + f - 1), so the scale's bias b becomes f * b + f - 1.
    """
    width = len(factors)
    shift_rows = slice(shift_chunk * width, (shift_chunk + 1) * width)
    scale_rows = slice(scale_chunk * width, (scale_chunk + 1) * width)
    bias = modulation.bias[scale_rows].double() * factors + factors - 1
    _multiply_rows(modulation, shift_rows, factors)
    _multiply_rows(modulation, scale_rows, factors)
    modulation.bias[scale_rows] = bias.to(modulation.bias.dtype)


@torch.no_grad()
def plant(
    transformer: DiTTransformer2DModel,
    up: float = 30.0,
    down: float = 10.0,
    channels: int = 4,
    seed: int = SEED,
) -> DiTTransformer2DModel:
    """Plant outlier channels into every block, in place, keeping the function.

    Per block, three activations get their own channels: the input of q, k and v; the input of the
    MLP's first linear; and the attention output, through v (averaging over tokens keeps channels
    apart). All products are taken in fp64 and rounded once to the weights' dtype: the output moves
    by about 2e-7 of its size in fp32, and by less than 1e-12 in fp64.

    Args:
        transformer: a DiT whose blocks own their `norm1.linear` (AdaLN-Zero).
        up: `channels` random channels are multiplied by up * U(0.5, 1.5).
        down: `channels` others are divided by down * U(0.5, 1.5).
        channels: how many of each, per activation.
        seed: of the channels and factors; the same on every machine.

    Returns:
        The same transformer.

    Raises:
        ValueError: the model is too narrow for `channels`, or a factor is not positive.
    """
    width = transformer.inner_dim
    if not 0 <= 2 * channels <= width or up <= 0 or down <= 0:
        raise ValueError(
            f"plant: needs up > 0, down > 0 and 2 * channels <= {width}, "
            f"got up={up}, down={down}, channels={channels}"
        )
    drawn = _draw_blocks(transformer, up, down, channels, seed)
    for block, (qkv, fc1, value) in zip(transformer.transformer_blocks, drawn, strict=True):
        attention, modulation = block.attn1, block.norm1.linear
        _multiply_modulated(modulation, 0, 1, qkv)
        _divide_columns([attention.to_q, attention.to_k, attention.to_v], qkv)
        _multiply_modulated(modulation, 3, 4, fc1)
        _divide_columns([block.ff.net[0].proj], fc1)
        _multiply_rows(attention.to_v, slice(None), value)
        _divide_columns([attention.to_out[0]], value)
    return transformer


@torch.no_grad()
def plant_asymmetry(
    transformer: DiTTransformer2DModel,
    offset: float = 12.0,
    up: float = 30.0,
    down: float = 10.0,
    channels: int = 4,
    seed: int = SEED,
) -> DiTTransformer2DModel:
    """Plant outlier channels as `plant` does, then a constant v into those and as many others.

    An input X becomes X + v: the bias of what makes it gets v, and its readers' W X + b get b - W v.
    The sites are those of `plant`: both modulated inputs (v joins the AdaLN shift), and the attention
    output (v joins the bias of to_v, because softmax rows sum to one). v is +- offset * U(0.5, 1.5) * f
    on the `channels` that were multiplied by f, the same with f = 1 on `channels` that keep their
    size, else 0. A natural channel's middle lies 0.1 to 0.4 half ranges from zero (median; the
    farthest 2.6), a planted one's 0.7 to 27, mostly 4 to 13. The output moves by about 2e-7 of its
    size in fp32, and by less than 1e-12 in fp64.

    Args:
        transformer: as in `plant`; changed in place.
        offset: size of v, in units of the model's activations.
        up: as in `plant`.
        down: as in `plant`.
        channels: as in `plant`; 3 * channels must fit into the width.
        seed: of channels, factors and v.

    Returns:
        The same transformer.

    Raises:
        ValueError: as `plant`; or 3 * channels do not fit.
    """
    if 3 * channels > transformer.inner_dim:
        raise ValueError(
            f"plant_asymmetry: needs 3 * channels <= {transformer.inner_dim}, got channels={channels}"
        )
    plant(transformer, up, down, channels, seed)
    rng = random.Random(seed + 1)
    drawn = _draw_blocks(transformer, up, down, channels, seed)  # what `plant` drew
    for block, factors in zip(transformer.transformer_blocks, drawn, strict=True):
        qkv, fc1, value = (_draw_shift(part, offset, channels, rng) for part in factors)
        attention, bias, width = block.attn1, block.norm1.linear.bias, len(qkv)
        for chunk, shift in ((0, qkv), (3, fc1)):  # shift_msa, shift_mlp
            rows = slice(chunk * width, (chunk + 1) * width)
            bias[rows] = (bias[rows].double() + shift).to(bias.dtype)
        _compensate([attention.to_q, attention.to_k, attention.to_v], qkv)
        _compensate([block.ff.net[0].proj], fc1)
        attention.to_v.bias.copy_(attention.to_v.bias.double() + value)
        _compensate([attention.to_out[0]], value)
    return transformer


def _draw_blocks(
    transformer: DiTTransformer2DModel, up: float, down: float, channels: int, seed: int
) -> list[list[torch.Tensor]]:
    """Factors [width] of every block's three sites: qkv, fc1, attention output."""
    rng, width = random.Random(seed), transformer.inner_dim
    blocks = range(len(transformer.transformer_blocks))
    return [[_draw_factors(width, up, down, channels, rng) for _ in range(3)] for _ in blocks]


def _draw_shift(
    factors: torch.Tensor, offset: float, channels: int, rng: random.Random
) -> torch.Tensor:
    """Draw v [width] fp64: on the largest `channels` factors, and on as many that are 1."""
    order = sorted(range(len(factors)), key=lambda _: rng.random())
    largest = factors.argsort(descending=True, stable=True)[:channels].tolist()
    kept = [channel for channel in order if factors[channel] == 1 and channel not in largest]
    shift = torch.zeros_like(factors)
    for channel in largest + kept[:channels]:
        sign = 1 if rng.random() < 0.5 else -1
        shift[channel] = sign * offset * (0.5 + rng.random()) * factors[channel]
    return shift


def _compensate(linears: Iterable[nn.Linear], shift: torch.Tensor) -> None:
    """Let linears take inputs to which `shift` [K] was added: b - W v."""
    for linear in linears:
        linear.bias.copy_(linear.bias.double() - linear.weight.double() @ shift)  # copy_ casts back

"""Plants outlier channels, and asymmetric ones, into a DiT or a Flux without changing its function.

The digits models have no salient channels of their own (the largest channel's range is 3 to 6 times
the median's), so they cannot tell a method that handles them from one that does not. Real DiTs have
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
from typing import Any

import torch

from ditq_converters.demo.planted_sites import Modulated, Values, sites_of

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


@torch.no_grad()
def plant(
    transformer: Any,
    up: float = 30.0,
    down: float = 10.0,
    channels: int = 4,
    seed: int = SEED,
) -> Any:
    """Plant outlier channels into every block, in place, keeping the function.

    In every block each of these gets its own channels: the AdaLN-modulated inputs of the attention
    and of the MLP (of both streams, or of the two together, in a Flux), and the attention output,
    through v. The output moves by about 2e-7 of its size in fp32, and by less than 1e-12 in fp64.

    Args:
        transformer: a DiT whose blocks own their `norm1.linear` (AdaLN-Zero), or a Flux.
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
    for site, factors in _draw_sites(transformer, up, down, channels, seed):
        site.multiply(factors)
    return transformer


@torch.no_grad()
def plant_asymmetry(
    transformer: Any,
    offset: float = 12.0,
    up: float = 30.0,
    down: float = 10.0,
    channels: int = 4,
    seed: int = SEED,
) -> Any:
    """Plant outlier channels as `plant` does, then a constant v into those and as many others.

    An input X becomes X + v: the bias of what makes it gets v, and its readers' W X + b get b - W v.
    The sites are those of `plant`: in a modulated input v joins the AdaLN shift, in the attention
    output the bias of to_v, because softmax rows sum to one. v is +- offset * U(0.5, 1.5) * f
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
    for site, factors in _draw_sites(transformer, up, down, channels, seed):  # what `plant` drew
        site.add(_draw_offsets(factors, offset, channels, rng))
    return transformer


def _draw_sites(
    transformer: Any, up: float, down: float, channels: int, seed: int
) -> list[tuple[Modulated | Values, torch.Tensor]]:
    """Every site with its factors [width]."""
    rng, width = random.Random(seed), transformer.inner_dim
    return [(site, _draw_factors(width, up, down, channels, rng)) for site in sites_of(transformer)]


def _draw_offsets(
    factors: torch.Tensor, offset: float, channels: int, rng: random.Random
) -> torch.Tensor:
    """Draw v [width] fp64: on the largest `channels` factors, and on as many that are 1."""
    order = sorted(range(len(factors)), key=lambda _: rng.random())
    largest = factors.argsort(descending=True, stable=True)[:channels].tolist()
    kept = [channel for channel in order if factors[channel] == 1 and channel not in largest]
    offsets = torch.zeros_like(factors)
    for channel in largest + kept[:channels]:
        sign = 1 if rng.random() < 0.5 else -1
        offsets[channel] = sign * offset * (0.5 + rng.random()) * factors[channel]
    return offsets

"""AdaLN in canonical form, and the class swap that makes a stock block use it."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

from ditq_runtime.families.sites import TIMESTEP_GROUPS
from ditq_runtime.layers.carrier import here


class Modulation(NamedTuple):
    """What a block of two sublayers gets from its modulation, in diffusers' order; each [B, D].

    The scales are multipliers: (1 + scale) / s.
    """

    shift_msa: torch.Tensor
    scale_msa: torch.Tensor
    gate_msa: torch.Tensor
    shift_mlp: torch.Tensor
    scale_mlp: torch.Tensor
    gate_mlp: torch.Tensor


def modulate(
    hidden: torch.Tensor, norm: nn.LayerNorm, multiplier: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """AdaLN in canonical form: LN(h) * a + b (HTG Eq. 11, PTQ4DiT Eq. 19-21), in fp32 or wider.

    Args:
        hidden: [B, T, D] the residual stream, any float dtype.
        norm: its layer norm, with or without affine parameters.
        multiplier: [B, D] a = (1 + scale) / s, as the folded modulation gives it.
        shift: [B, D] b = shift / s.

    Returns:
        [B, T, D] in fp32 (fp64 for fp64 input): the quantizer that follows sees no half-precision rounding.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight, bias = (p if p is None else p.to(wide) for p in (norm.weight, norm.bias))
    normed = nn.functional.layer_norm(
        hidden.to(wide), norm.normalized_shape, weight, bias, norm.eps
    )
    return normed * multiplier[:, None] + shift[:, None]


def add_gated(hidden: torch.Tensor, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One residual step, hidden [B, T, D] + gate [B, D] * x [B, T, D], in the dtype of the residual stream."""
    return (hidden + gate[:, None] * x).to(hidden.dtype)


def add_mlp(
    hidden: torch.Tensor, norm: nn.LayerNorm, mlp: nn.Module, m: Modulation
) -> torch.Tensor:
    """The second half of a block: hidden + gate_mlp * mlp(AdaLN(hidden)), [B, T, D]."""
    x = modulate(hidden, norm, m.scale_mlp, m.shift_mlp)
    return add_gated(hidden, m.gate_mlp, mlp(x))


HOISTS = "ditq_hoists"  # attribute of a model: the `ditq_runtime.speed.hoist.Hoist` of each prepared pipeline


def hoisted_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of a model whose modulation some prepared pipeline computes before its sampling loop."""
    hoists = (hoist for hoist in getattr(model, HOISTS, ()) if not hoist.has_adapter())
    return {module for hoist in hoists for module in hoist.holders}


def hoisted(module: nn.Module) -> torch.Tensor | None:
    """The modulation [B, N] that waits for a module in this forward; None: it computes its own."""
    waiting = here().hoisted
    return None if waiting is None else waiting.get(module)


def modulation_rows(norm: Any, embedding: torch.Tensor) -> torch.Tensor:
    """What the linear of an AdaLN of diffusers makes of the conditioning [B, D], or what waits for the norm: [B, N]."""
    rows = hoisted(norm)
    return norm.linear(norm.silu(embedding)) if rows is None else rows


def modulation(norm: Any, embedding: torch.Tensor) -> Modulation:
    """The modulation of an AdaLayerNormZero of diffusers for the conditioning [B, D]."""
    return Modulation(*modulation_rows(norm, embedding).chunk(6, dim=1))


def hoisted_rows(
    blocks: dict[nn.Module, list[Any]], timesteps: torch.Tensor, embedding: torch.Tensor
) -> list[torch.Tensor]:
    """What each AdaLN of some blocks makes of many conditionings [S * B, D] at their timesteps; see `Hoistable`."""
    values = []
    for block, norms in blocks.items():
        find_group(block, timesteps)
        values += [modulation_rows(norm, embedding) for norm in norms]
    return values


def find_group(block: nn.Module, timestep: torch.Tensor | None = None) -> None:
    """Let a block with grouped layers find its timestep group; other blocks do nothing.

    Args:
        block: with or without timestep groups.
        timestep: [B]; None for blocks that are not given it: the forward carries it.
    """
    groups = block._modules.get(TIMESTEP_GROUPS)
    if groups is not None:
        groups(timestep)


_SUBCLASSES: dict[tuple[type, Any], type] = {}


def swap_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a stock module another forward by swapping its class for a subclass of the same name.

    A class swap, not a patched method: hooks of accelerate and diffusers, deep copies and compilation keep working.
    """
    stock = type(module)
    if (stock, forward) not in _SUBCLASSES:
        # pickle looks for a class by its name, which is that of the stock class
        inside = {"forward": forward, "__reduce__": _reduce}
        subclass = type(stock.__name__, (stock,), inside)
        _introduce(subclass, stock)
        _SUBCLASSES[stock, forward] = subclass
    module.__class__ = _SUBCLASSES[stock, forward]


def _reduce(module: nn.Module) -> tuple[Any, ...]:
    """As `copy` and `pickle` make another: from what the subclass was made of."""
    stock, forward = type(module).__bases__[0], type(module).forward
    return _rebuild, (stock, forward), dict(vars(module))


def _rebuild(stock: type[nn.Module], forward: Callable[..., Any]) -> nn.Module:
    module = stock.__new__(stock)
    swap_forward(module, forward)
    return module


def _introduce(subclass: type, stock: type) -> None:
    """Tell diffusers' caches about the subclass: they look up a block's exact class."""
    try:
        metadata = TransformerBlockRegistry.get(stock)
    except ValueError:  # no cache knows the stock class either
        return
    TransformerBlockRegistry.register(subclass, copy(metadata))

"""Quantizers as plain functions, which Inductor fuses with what stands before them: the bits of the ops.

The reference itself will not do: it writes into its own intermediates, and `torch.func.functionalize` of it cannot run
inside of AOTAutograd's own functionalization (torch 2.13). A test holds both together.

Not where a row is wider than `WIDEST` on a GPU: Inductor's kernel would write it to memory in fp32 and read it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import ditq_kernels as k
from ditq_kernels.codes import numerics

WIDEST = 1024  # numbers in a row that one program of Inductor's keeps in registers


def decompositions(widest: int = WIDEST) -> dict[Any, Callable[..., Any]]:
    """Operator -> what it is made of, or NotImplemented for a row that stays with our kernel.

    Args:
        widest: the widest row on a GPU.
    """

    def narrow(definition: Callable[..., Any]) -> Callable[..., Any]:
        def decompose(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
            if x.device.type != "cpu" and x.shape[1] > widest:
                return NotImplemented
            return definition(x, *rest, **options)

        return decompose

    return {op: narrow(definition) for op, definition in TABLE.items()}


def quantize_per_token(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    asymmetric: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op, without writing into memory."""
    x = _transformed(x, smooth_inv, group_shift, group_index)
    if asymmetric:
        scale, zero_point = k.asymmetric_scale(x.amin(dim=1), x.amax(dim=1))
        return _codes(x, scale[:, None], zero_point[:, None]), scale, zero_point
    scale = k.symmetric_scale(x.abs().amax(dim=1))
    steps = torch.round(x * numerics.inverse_scale(scale)[:, None])
    codes = torch.clamp(steps, -numerics.INT8_MAX, numerics.INT8_MAX).to(torch.int8)
    return codes, scale, x.new_empty(0, dtype=torch.int32)


def quantize_static(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """As the op, without writing into memory."""
    x = _transformed(x, smooth_inv, group_shift, group_index)
    heads = x.unflatten(1, (scale.shape[0], -1))  # [T, H, D]
    return _codes(heads, scale[:, None], zero_point).flatten(1)


def gelu_quantize(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    asymmetric: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op, without writing into memory; GELU is Inductor's."""
    x = torch.nn.functional.gelu(x.float(), approximate="tanh")
    if scale is None:
        return quantize_per_token(x, smooth_inv, group_shift, group_index, asymmetric)
    codes = quantize_static(x, scale, zero_point, smooth_inv, group_shift, group_index)
    return codes, x.new_empty(0), x.new_empty(0, dtype=torch.int32)


def adaln_quantize(
    x: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None,
    group_index: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    values_dtype: torch.dtype | None,
    asymmetric: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op, without writing into memory; the norm is Inductor's, its sums in another order."""
    if group_shift is not None and group_index is not None:
        shift = shift - group_shift[group_index]
    y = torch.nn.functional.layer_norm(x.float(), x.shape[1:], eps=eps)
    y = y.unflatten(0, (multiplier.shape[0], -1))  # [B, T / B, K]
    y = (y * multiplier[:, None] + shift[:, None]).flatten(0, 1)
    values = x.new_empty((0, x.shape[1])) if values_dtype is None else y.to(values_dtype)
    if scale is None:
        return *quantize_per_token(y, smooth_inv, asymmetric=asymmetric), values
    codes = quantize_static(y, scale, zero_point, smooth_inv)
    return codes, y.new_empty(0), y.new_empty(0, dtype=torch.int32), values


TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.ditq.quantize_per_token.default: quantize_per_token,
    torch.ops.ditq.quantize_static.default: quantize_static,
    torch.ops.ditq.gelu_quantize.default: gelu_quantize,
    torch.ops.ditq.adaln_quantize.default: adaln_quantize,
}


def _codes(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    steps = torch.round(x * numerics.inverse_scale(scale))
    if zero_point is not None:
        steps = steps + zero_point
    return torch.clamp(steps, -numerics.INT8_OFFSET, numerics.INT8_MAX).to(torch.int8)


def _transformed(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None,
    group_index: torch.Tensor | None,
) -> torch.Tensor:
    """(x - shift) * smooth_inv in fp32."""
    x = x.float()
    if group_shift is not None and group_index is None:
        x = x - group_shift
    elif group_shift is not None:
        samples = x.unflatten(0, (group_index.shape[0], -1))  # type: ignore[union-attr]
        x = (samples - group_shift[group_index][:, None]).flatten(0, 1)
    return x if smooth_inv is None else x * smooth_inv

"""Rows of activations in registers, as two parts of power-of-two width, and what makes them codes.

A block must be a power of two, and widths of DiTs are not: 1152 in one block of 2048 would waste
almost half of the instructions, 1024 + 128 wastes none.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import (
    INT8_MAX,
    INT8_MIN,
    MIN_SCALE,
    ROUND_TO_INTEGER,
    gelu_tanh,
    rounded_steps,
)
from ditq_kernels.codes import numerics

INT8_LEVELS = tl.constexpr(numerics.INT8_LEVELS)


class Before(NamedTuple):
    """What happens to rows before they are quantized, in this order; a stage whose pointer is None is left out."""

    gelu: Any  # constexpr bool
    group_shift: Any = None  # [G, K] fp32
    group_index: Any = None  # [samples] int64, or None: G is 1
    rows_per_sample: Any = None
    one_sample: Any = None  # constexpr bool: no program has rows of two samples
    smooth_inv: Any = None  # [K] fp32


def stages_before(
    num_tokens: int,
    rows: int,
    gelu: bool,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None,
    group_index: torch.Tensor | None,
) -> Before:
    """Arguments as in `quantize.quantize_per_token`, of a launch of `rows` tokens a program."""
    stages = Before(tl.constexpr(gelu), group_shift, smooth_inv=smooth_inv)
    if group_index is None:
        return stages
    rows_per_sample = num_tokens // group_index.numel()
    one_sample = tl.constexpr(rows_per_sample % rows == 0)
    return stages._replace(
        group_index=group_index, rows_per_sample=rows_per_sample, one_sample=one_sample
    )


def row_parts(in_features: int) -> tuple[int, int]:
    """Widths of the two parts; the second is 0 if the first holds the row."""
    first = 1 << (in_features.bit_length() - 1)
    rest = in_features - first
    return first, triton.next_power_of_2(rest) if rest else 0


@triton.jit
def load_row_part(
    x_ptr, t, T, K, stride_xt, START: tl.constexpr, BLOCK: tl.constexpr
):
    """fp32 [rows of t, BLOCK] from input START on; zero outside of [T, K]."""
    k = START + tl.arange(0, BLOCK)
    inside = (t < T)[:, None] & (k < K)[None, :]
    rows = t.to(tl.int64) * stride_xt  # int64: T * K may pass 2**31
    return tl.load(x_ptr + rows[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def prepared_row_part(
    x_ptr, before, t, T, K, stride_xt, START: tl.constexpr, BLOCK: tl.constexpr
):
    """The same after the stages of `before`; zero past the end of a row."""
    x = load_row_part(x_ptr, t, T, K, stride_xt, START, BLOCK)
    k = START + tl.arange(0, BLOCK)
    if before.gelu:
        x = gelu_tanh(x)
    if before.group_shift is not None:
        if before.group_index is None:
            x -= tl.load(before.group_shift + k, mask=k < K, other=0.0)[None, :]
        elif before.one_sample:
            group = tl.load(before.group_index + tl.program_id(0) * t.shape[0] // before.rows_per_sample)
            x -= load_vectors(before.group_shift, group, K, k, K, True)
        else:
            group = tl.load(before.group_index + tl.minimum(t, T - 1) // before.rows_per_sample)
            x -= load_vectors(before.group_shift, group, K, k, K, False)
    if before.smooth_inv is not None:
        x *= tl.load(before.smooth_inv + k, mask=k < K, other=0.0)[None, :]
    return x


@triton.jit
def load_vectors(table_ptr, rows, stride, k, K, ONE_SAMPLE: tl.constexpr):
    """Inputs k of a row of a table: [1, BLOCK] for one sample, [ROWS, BLOCK] for the sample of each token."""
    if ONE_SAMPLE:
        values = tl.load(table_ptr + rows * stride + k, mask=k < K, other=0.0)[None, :]
    else:
        at = table_ptr + (rows * stride)[:, None] + k[None, :]
        values = tl.load(at, mask=(k < K)[None, :], other=0.0)
    return values


@triton.jit
def store_row_part(
    q_ptr, q, t, T, K, stride_qt, START: tl.constexpr, BLOCK: tl.constexpr
):
    """Store int8 codes where `load_row_part` read."""
    k = START + tl.arange(0, BLOCK)
    inside = (t < T)[:, None] & (k < K)[None, :]
    rows = t.to(tl.int64) * stride_qt
    tl.store(q_ptr + rows[:, None] + k[None, :], q.to(tl.int8), mask=inside)


@triton.jit
def store_token_codes(
    x_a, x_b, q_ptr, scale_ptr, zero_point_ptr, t, T, K, stride_qt,
    ROWS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Codes of whole rows, each with its own scale, and with its own zero point unless zero_point_ptr is None.

    Rows are two parts, zero past their end; x_b is anything if BLOCK_B is 0.
    """
    if zero_point_ptr is None:
        absmax = tl.max(tl.abs(x_a), axis=1)
        if BLOCK_B > 0:
            absmax = tl.maximum(absmax, tl.max(tl.abs(x_b), axis=1))
        scale, inv_scale = scale_of_steps(absmax, INT8_MAX, ROWS)
        q_a = rounded_steps(x_a, inv_scale, -INT8_MAX, INT8_MAX)
        if BLOCK_B > 0:
            q_b = rounded_steps(x_b, inv_scale, -INT8_MAX, INT8_MAX)
    else:
        low, high = tl.min(x_a, axis=1), tl.max(x_a, axis=1)
        if BLOCK_B > 0:
            low, high = tl.minimum(low, tl.min(x_b, axis=1)), tl.maximum(high, tl.max(x_b, axis=1))
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        scale, inv_scale = scale_of_steps(high - low, INT8_LEVELS, ROWS)
        steps = tl.minimum(tl.maximum(-low[:, None] * inv_scale, 0.0), INT8_LEVELS * 1.0)
        zero = steps + ROUND_TO_INTEGER - ROUND_TO_INTEGER  # the code 0..255 of 0.0, a float: see `rounded_steps`
        zero_point = rounded_steps(zero, 1.0, 0.0, INT8_LEVELS * 1.0) + INT8_MIN  # [ROWS, 1]
        q_a = rounded_steps(x_a, inv_scale, -zero, -zero + INT8_LEVELS) + zero_point
        if BLOCK_B > 0:
            q_b = rounded_steps(x_b, inv_scale, -zero, -zero + INT8_LEVELS) + zero_point
        tl.store((zero_point_ptr + t)[:, None], zero_point, mask=(t < T)[:, None])
    store_row_part(q_ptr, q_a, t, T, K, stride_qt, 0, BLOCK_A)
    if BLOCK_B > 0:
        store_row_part(q_ptr, q_b, t, T, K, stride_qt, BLOCK_A, BLOCK_B)
    tl.store(scale_ptr + t, scale, mask=t < T)


@triton.jit
def scale_of_steps(width, STEPS: tl.constexpr, ROWS: tl.constexpr):
    """Scale of rows whose values span STEPS steps, and its reciprocal, as in `numerics`: [ROWS], [ROWS, 1]."""
    # div_rn, not `/`: on NVIDIA `/` may be 2 ulp off, and the interpreter does not show it
    scale = tl.maximum(tl.div_rn(width, tl.full((ROWS,), STEPS, tl.float32)), MIN_SCALE)
    return scale, tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None]

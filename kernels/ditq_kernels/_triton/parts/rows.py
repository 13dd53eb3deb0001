"""Rows of activations in registers, as two parts of power-of-two width.

A block must be a power of two, and widths of DiTs are not: 1152 in one block of 2048 would waste
almost half of the instructions, 1024 + 128 wastes none.
"""

import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import INT8_MAX, MIN_SCALE, gelu_tanh


def row_parts(in_features: int) -> tuple[int, int]:
    """Widths of the two parts; the second is 0 if the first holds the row."""
    first = 1 << (in_features.bit_length() - 1)
    rest = in_features - first
    return first, triton.next_power_of_2(rest) if rest else 0


@triton.jit
def load_row_part(
    x_ptr, smooth_inv_ptr, t, T, K, stride_xt,
    START: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr = False,
):  # fmt: skip
    """fp32 [rows of t, BLOCK] from input START on, through GELU if asked, smoothed; zero outside of [T, K]."""
    k = START + tl.arange(0, BLOCK)
    inside = (t < T)[:, None] & (k < K)[None, :]
    rows = t.to(tl.int64) * stride_xt  # int64: T * K may pass 2**31
    x = tl.load(x_ptr + rows[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if GELU:
        x = gelu_tanh(x)
    if smooth_inv_ptr is not None:
        x *= tl.load(smooth_inv_ptr + k, mask=k < K, other=0.0)[None, :]
    return x


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
def symmetric_scale(absmax, ROWS: tl.constexpr):
    """Scale of each row and its reciprocal, as `numerics.symmetric_scale`: [ROWS], [ROWS, 1]."""
    # div_rn, not `/`: on NVIDIA `/` may be 2 ulp off, and the interpreter does not show it
    scale = tl.maximum(tl.div_rn(absmax, tl.full((ROWS,), INT8_MAX, tl.float32)), MIN_SCALE)
    return scale, tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None]

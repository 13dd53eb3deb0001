"""The epilogue of every GEMM: from sums to outputs, in the order of the reference, one rounding a step.

    y = total * (scale * weight_scale)      the zero point is taken out before, in integers;
                                            with real groups, total has the weight scales in it
    y = y + lora_x @ lora_up.T              bf16 products, summed in fp32
    y = y + bias[group of the row]
    y = residual + gate[sample of the row] * y (or + y), or q = quantize(gelu(y) * smooth_inv)

A stage is a named tuple of pointers and sizes and the function that applies it; a kernel gets one `Epilogue` and
compiles the stages whose first pointer is not None (Triton 3.6 cannot compare a tuple that holds None with None).
Tiles are [T, N] or, where weights are the first operand, [N, T].
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import INTERPRETED, gelu_tanh, static_codes
from ditq_kernels.launch import tuning

MAX_BLOCK_R = 64  # rank of one low-rank product; larger ranks take several


class Scales(NamedTuple):
    """Dequantization: steps of activations and weights, and the zero point of the activations."""

    scale: Any  # [T] or [1] fp32
    weight_scale: Any  # [N] fp32, or None: the sums are fp32 and weight scales are in them
    zero_point: Any  # [T] or [1] int32, or None
    weight_sum: Any  # [N] int32, or None
    per_token_scale: Any  # constexpr bool
    per_token_zero: Any  # constexpr bool


class LowRank(NamedTuple):
    """The second factor of a low-rank branch and what the first one made of the activations."""

    x: Any = None  # [T, R] bf16
    up: Any = None  # [N, R] bf16
    stride_xt: Any = None
    stride_un: Any = None
    rank: Any = None  # constexpr
    block_r: Any = None  # constexpr
    bf16_dot: Any = None  # constexpr bool


class Bias(NamedTuple):
    """One bias, or one of several for each sample of neighbouring rows."""

    table: Any = None  # [N] or [G, N] fp32
    index: Any = None  # [samples] int64, or None
    rows_per_sample: Any = None
    one_sample: Any = None  # constexpr bool: no tile holds rows of two samples


class Residual(NamedTuple):
    """A residual stream to add to, and perhaps a gate for each sample."""

    base: Any = None  # [T, N] float
    stride_bt: Any = None
    gate: Any = None  # [samples, N] fp32, or None
    stride_gs: Any = None
    rows_per_sample: Any = None
    one_sample: Any = None  # as in Bias


class GeluCodes(NamedTuple):
    """GELU and the static quantizer of the next layer."""

    scale: Any = None  # [1] fp32
    zero_point: Any = None  # [1] int32
    smooth_inv: Any = None  # [N] fp32, or None


class Epilogue(NamedTuple):
    """What happens to the sums, in this order."""

    scales: Scales
    low_rank: LowRank = LowRank()
    bias: Bias = Bias()
    residual: Residual = Residual()
    gelu: GeluCodes = GeluCodes()


@triton.jit
def dequantized(total, scales, t, n, T, N, T_AXIS: tl.constexpr):
    """fp32 tile of the sums."""
    N_AXIS: tl.constexpr = 1 - T_AXIS  # expand_dims inserts the axis of the other index
    in_t, in_n = t < T, n < N
    if scales.zero_point is not None:
        if scales.per_token_zero:
            zero_point = tl.load(scales.zero_point + t, mask=in_t, other=0)
            zero_point = tl.expand_dims(zero_point, N_AXIS)
        else:
            zero_point = tl.load(scales.zero_point)
        weight_sum = tl.load(scales.weight_sum + n, mask=in_n, other=0)
        total -= zero_point * tl.expand_dims(weight_sum, T_AXIS)
    if scales.per_token_scale:
        real_step = tl.expand_dims(tl.load(scales.scale + t, mask=in_t, other=0.0), N_AXIS)
    else:
        real_step = tl.load(scales.scale)
    if scales.weight_scale is not None:
        weight_scale = tl.load(scales.weight_scale + n, mask=in_n, other=0.0)
        real_step *= tl.expand_dims(weight_scale, T_AXIS)
    return total.to(tl.float32) * real_step


@triton.jit
def plus_low_rank(y, low_rank, t, n, T, N, T_AXIS: tl.constexpr):
    """Add x @ up.T to y, one instruction after another."""
    # rows past the end read the last row instead of needing a mask; they are never stored
    rows = tl.minimum(t, T - 1).to(tl.int64) * low_rank.stride_xt
    columns = tl.minimum(n, N - 1).to(tl.int64) * low_rank.stride_un
    for start in tl.static_range(0, low_rank.rank, low_rank.block_r):
        r = start + tl.arange(0, low_rank.block_r)
        inside = (r < low_rank.rank)[None, :]
        x = tl.load(low_rank.x + rows[:, None] + r[None, :], mask=inside, other=0.0)
        up = tl.load(low_rank.up + columns[:, None] + r[None, :], mask=inside, other=0.0)
        if not low_rank.bf16_dot:  # the interpreter has no bf16 product
            x, up = x.to(tl.float32), up.to(tl.float32)
        y = tl.dot(x, tl.trans(up), y) if T_AXIS == 0 else tl.dot(up, tl.trans(x), y)
    return y


@triton.jit
def load_table_rows(
    table, row, stride, t, n, T, N, ONE_ROW: tl.constexpr, T_AXIS: tl.constexpr
):
    """Values of each output in a row of a table: one row for the tile (ONE_ROW), or one for each token."""
    N_AXIS: tl.constexpr = 1 - T_AXIS
    if ONE_ROW:
        values = tl.expand_dims(tl.load(table + row * stride + n, mask=n < N, other=0.0), T_AXIS)
    else:
        inside = tl.expand_dims(t < T, N_AXIS) & tl.expand_dims(n < N, T_AXIS)
        at = tl.expand_dims(row * stride, N_AXIS) + tl.expand_dims(n, T_AXIS)
        values = tl.load(table + at, mask=inside, other=0.0)
    return values


@triton.jit
def offsets_in_tile(stride, shape: tl.constexpr, T_AXIS: tl.constexpr):
    """Int32 offsets of a tile's elements from its first one, whose rows of outputs are `stride` apart."""
    N_AXIS: tl.constexpr = 1 - T_AXIS
    rows = tl.expand_dims(tl.arange(0, shape[T_AXIS]) * stride, N_AXIS)
    return rows + tl.expand_dims(tl.arange(0, shape[N_AXIS]), T_AXIS)


@triton.jit
def plus_bias(y, bias, first_t, t, n, T, N, T_AXIS: tl.constexpr):
    """Add the bias, of the group of each sample if there are several."""
    if bias.index is None:
        row = 0
        values = load_table_rows(bias.table, row, 0, t, n, T, N, True, T_AXIS)
    elif bias.one_sample:
        row = tl.load(bias.index + first_t // bias.rows_per_sample)
        values = load_table_rows(bias.table, row, N, t, n, T, N, True, T_AXIS)
    else:
        row = tl.load(bias.index + t // bias.rows_per_sample, mask=t < T, other=0)
        values = load_table_rows(bias.table, row, N, t, n, T, N, False, T_AXIS)
    return y + values


@triton.jit
def plus_residual(y, residual, first_t, first_n, t, n, T, N, T_AXIS: tl.constexpr):
    """Gate if there is one, then add the residual."""
    N_AXIS: tl.constexpr = 1 - T_AXIS
    if residual.gate is not None:
        if residual.one_sample:
            row = (first_t // residual.rows_per_sample).to(tl.int64)
        else:
            row = (t // residual.rows_per_sample).to(tl.int64)
        y *= load_table_rows(
            residual.gate, row, residual.stride_gs, t, n, T, N, residual.one_sample, T_AXIS
        )
    inside = tl.expand_dims(t < T, N_AXIS) & tl.expand_dims(n < N, T_AXIS)
    first = first_t.to(tl.int64) * residual.stride_bt + first_n
    at = residual.base + first + offsets_in_tile(residual.stride_bt, y.shape, T_AXIS)
    return tl.load(at, mask=inside, other=0.0).to(tl.float32) + y


@triton.jit
def gelu_codes(y, gelu, n, N, T_AXIS: tl.constexpr):
    """Codes of smoothed GELU, int32."""
    y = gelu_tanh(y)
    if gelu.smooth_inv is not None:
        smooth_inv = tl.load(gelu.smooth_inv + n, mask=n < N, other=0.0)
        y *= tl.expand_dims(smooth_inv, T_AXIS)
    return static_codes(y, gelu.scale, gelu.zero_point)


@triton.jit
def parts_of(tile, PARTS: tl.constexpr):
    """A tile in 1, 2 or 4 parts along its second axis; every thread keeps what it has."""
    if PARTS == 1:
        parts = (tile,)
    else:
        halves = tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))
        parts = halves if PARTS == 2 else parts_of(halves[0], 2) + parts_of(halves[1], 2)
    return parts


@triton.jit
def write_tile(
    total, tile_t, tile_n, T, N, out_ptr, stride_ot, epilogue, T_AXIS: tl.constexpr, PARTS: tl.constexpr = 1
):  # fmt: skip
    """Apply every stage to a tile of sums, [T, N] (T_AXIS 0) or [N, T] (1), and store it in out [T, N].

    PARTS of a tile, one after the other, need fewer registers: values that a stage loads are those of a part.
    """
    first_t, first_n = tile_t * total.shape[T_AXIS], tile_n * total.shape[1 - T_AXIS]
    parts = parts_of(total, PARTS)
    for i in tl.static_range(PARTS):
        at = i * (total.shape[1] // PARTS)
        part_t, part_n = (first_t, first_n + at) if T_AXIS == 0 else (first_t + at, first_n)
        write_part(parts[i], part_t, part_n, T, N, out_ptr, stride_ot, epilogue, T_AXIS)


@triton.jit
def write_part(total, first_t, first_n, T, N, out_ptr, stride_ot, epilogue, T_AXIS: tl.constexpr):
    """The same for sums from a token and an output on."""
    N_AXIS: tl.constexpr = 1 - T_AXIS
    t = first_t + tl.arange(0, total.shape[T_AXIS])
    n = first_n + tl.arange(0, total.shape[N_AXIS])
    y = dequantized(total, epilogue.scales, t, n, T, N, T_AXIS)
    if epilogue.low_rank.x is not None:
        y = plus_low_rank(y, epilogue.low_rank, t, n, T, N, T_AXIS)
    if epilogue.bias.table is not None:
        y = plus_bias(y, epilogue.bias, first_t, t, n, T, N, T_AXIS)
    if epilogue.residual.base is not None:
        y = plus_residual(y, epilogue.residual, first_t, first_n, t, n, T, N, T_AXIS)
    if epilogue.gelu.scale is not None:
        y = gelu_codes(y, epilogue.gelu, n, N, T_AXIS)
    inside = tl.expand_dims(t < T, N_AXIS) & tl.expand_dims(n < N, T_AXIS)
    first = first_t.to(tl.int64) * stride_ot + first_n  # int64: T * N may pass 2**31
    at = out_ptr + first + offsets_in_tile(stride_ot, total.shape, T_AXIS)
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=inside)


def gemm_launch(
    op: str,
    q: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias_index: torch.Tensor | None,
    lora_x: torch.Tensor | None,
    lora_up: torch.Tensor | None,
    *,
    config: tuning.TileConfig | None,
    narrow: bool = False,
) -> tuple[Epilogue, tuning.TileConfig]:
    """The stages before the output and the tiles to compute them in; arguments as in `ops.gemm_w8a8`.

    `narrow` asks for the tiles of the op's `_epilogue` table, because more stages follow.
    """
    scales = Scales(
        scale, weight_scale, zero_point, weight_sum,
        tl.constexpr(scale.numel() > 1),
        tl.constexpr(zero_point is not None and zero_point.numel() > 1),
    )  # fmt: skip
    rows_per_sample = None if bias_index is None else q.shape[0] // bias_index.numel()
    if config is None:
        config = _tiles(op, q, rows_per_sample, narrow or lora_x is not None)
    one_sample = rows_per_sample is not None and rows_per_sample % config.block_t == 0
    stage = Bias()
    if bias is not None:
        stage = Bias(bias, bias_index, rows_per_sample, tl.constexpr(one_sample))
    return Epilogue(scales, _low_rank_stage(lora_x, lora_up), stage), config


def _tiles(
    op: str, q: torch.Tensor, rows_per_sample: int | None, narrow: bool
) -> tuning.TileConfig:
    """Wide tiles where the epilogue needs few registers, else those of the op's `_epilogue` table."""
    tables = tuning.tables_of(q.device)
    wide = tuning.tile_config(op, tables, *q.shape)
    if narrow or (rows_per_sample is not None and rows_per_sample % wide.block_t):
        return tuning.tile_config(f"{op}_epilogue", tables, *q.shape)
    return wide


def _low_rank_stage(x: torch.Tensor | None, up: torch.Tensor | None) -> LowRank:
    if x is None or up is None:
        return LowRank()
    rank = x.shape[1]
    block_r = min(MAX_BLOCK_R, max(16, triton.next_power_of_2(rank)))
    return LowRank(
        x, up, x.stride(0), up.stride(0),
        tl.constexpr(rank), tl.constexpr(block_r), tl.constexpr(not INTERPRETED),
    )  # fmt: skip

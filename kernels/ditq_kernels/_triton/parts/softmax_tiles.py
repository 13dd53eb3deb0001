"""What the attention kernels share: head tiles, int8 scores, the row maximum, base-2 logits.

Two passes over the keys: the first finds each row's maximum logit, the second needs no rescaling, so
the result does not depend on the tiles (FlashAttention, arXiv:2205.14135, runs one pass and rescales).
The second look at K costs 50 % more int8 products; with one scale for all keys of a head, the first
pass compares integers only. Keys that fit in one tile are looked at once.

A head dimension is two parts: 72 is 64 + 32 for the scores (an int8 product contracts 32 at a time)
and 64 + 16 for the outputs, instead of 128 for both.
"""

import math

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import static_codes
from ditq_kernels.launch import tuning

LOG2_E = math.log2(math.e)
LOWEST_INT32 = tl.constexpr(-(2**31))
LOWEST_LOGIT = tl.constexpr(-3.0e38)  # finite, so that a row without keys has no inf - inf

# which elements share a scale: by the number of dimensions it has
ONE, PER_HEAD, PER_IMAGE, PER_TOKEN = (tl.constexpr(kind) for kind in range(4))

SCORE_PARTS = {32: (32, 0), 64: (64, 0), 72: (64, 32), 88: (64, 32), 96: (64, 32), 128: (128, 0)}
VALUE_PARTS = {32: (32, 0), 64: (64, 0), 72: (64, 16), 88: (64, 32), 96: (64, 32), 128: (128, 0)}
MIN_BLOCK_K = 32


@triton.jit
def tile_of_head(Tq, H, BLOCK_Q: tl.constexpr):
    """Batch index and head of this program (int64: sizes of whole tensors may pass 2**31), its queries."""
    program, tiles = tl.program_id(0), tl.cdiv(Tq, BLOCK_Q)
    head = (program // tiles).to(tl.int64)
    return head // H, head % H, (program % tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)


@triton.jit
def scale_of_head(scale_ptr, b, h, H, T, KIND: tl.constexpr):
    """Where the scale or scales of a head begin."""
    if KIND == PER_TOKEN:
        at = scale_ptr + (b * H + h) * T
    elif KIND == PER_IMAGE:
        at = scale_ptr + b * H + h
    elif KIND == PER_HEAD:
        at = scale_ptr + h
    else:
        at = scale_ptr
    return at


@triton.jit
def rows_of_tile(start, Tk, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Keys of a tile counted from its start; those past the end repeat the last one."""
    rows = tl.arange(0, BLOCK_K)
    if not EVEN_K:
        rows = tl.minimum(rows, Tk - 1 - start)
    return rows


@triton.jit
def load_rows(
    x_ptr, rows, STRIDE: tl.constexpr, D: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr
):
    """[rows, BLOCK]: columns START and on of a [T, D] matrix, zero past D.

    Strides are constants: rows of 72 bytes are multiples of 8, and Triton asks arguments only about 16.
    """
    d = START + tl.arange(0, BLOCK)
    at = x_ptr + rows[:, None] * STRIDE + d[None, :]
    return tl.load(at) if START + BLOCK <= D else tl.load(at, mask=(d < D)[None, :], other=0)


@triton.jit
def load_queries(q_ptr, rows, STRIDE: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Both parts of int8 query rows; without a second part, the first one twice."""
    q_a = load_rows(q_ptr, rows, STRIDE, D, 0, A)
    q_b = q_a
    if B > 0:
        q_b = load_rows(q_ptr, rows, STRIDE, D, A, B)
    return q_a, q_b


@triton.jit
def scores(
    q_a, q_b, k_ptr, start, Tk,
    STRIDE: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """int32 [BLOCK_Q, BLOCK_K], exact. Keys past the end repeat the last one; mask them."""
    rows = rows_of_tile(start, Tk, EVEN_K, BLOCK_K)
    k_ptr += tl.cast(start, tl.int64) * STRIDE
    total = tl.dot(q_a, tl.trans(load_rows(k_ptr, rows, STRIDE, D, 0, A)), out_dtype=tl.int32)
    if B > 0:
        k_b = load_rows(k_ptr, rows, STRIDE, D, A, B)
        total = tl.dot(q_b, tl.trans(k_b), total, out_dtype=tl.int32)
    return total


@triton.jit
def attended(keys, key_mask_ptr, Tk):
    """Which keys exist and are not masked: bool [BLOCK_K]."""
    inside = keys < Tk
    if key_mask_ptr is not None:
        inside = inside & (tl.load(key_mask_ptr + keys, mask=inside, other=0) != 0)
    return inside


@triton.jit
def logits_of(
    total, row_step, k_scale_ptr, key_mask_ptr, keys, Tk,
    K_SCALE: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Base-2 logits, fp32 [BLOCK_Q, BLOCK_K]: total * (row_step * k_scale); -inf where not attended."""
    if K_SCALE == PER_TOKEN:
        at = k_scale_ptr + keys
        k_scale = tl.load(at) if EVEN_K else tl.load(at, mask=keys < Tk, other=0.0)
        logits = total.to(tl.float32) * (row_step[:, None] * k_scale[None, :])
    else:
        logits = total.to(tl.float32) * (row_step * tl.load(k_scale_ptr))[:, None]
    if (key_mask_ptr is not None) or (not EVEN_K):
        logits = tl.where(attended(keys, key_mask_ptr, Tk)[None, :], logits, float("-inf"))
    return logits


@triton.jit
def row_maximum(
    q_a, q_b, row_step, k_ptr, k_scale_ptr, key_mask_ptr, Tk,
    STRIDE: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    K_SCALE: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Largest base-2 logit of each row, fp32 [BLOCK_Q], finite: the first pass over the keys."""
    if K_SCALE == PER_TOKEN:
        top = tl.full((BLOCK_Q,), LOWEST_LOGIT, tl.float32)
    else:  # rounding is monotonic: the largest integer has the largest logit
        top = tl.full((BLOCK_Q,), LOWEST_INT32, tl.int32)
    for start in range(0, Tk, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        total = scores(q_a, q_b, k_ptr, start, Tk, STRIDE, D, A, B, EVEN_K, BLOCK_K)
        if K_SCALE == PER_TOKEN:
            logits = logits_of(
                total, row_step, k_scale_ptr, key_mask_ptr, keys, Tk, K_SCALE, EVEN_K
            )
            top = tl.maximum(top, tl.max(logits, 1))
        else:
            if (key_mask_ptr is not None) or (not EVEN_K):
                inside = attended(keys, key_mask_ptr, Tk)
                total = tl.where(inside[None, :], total, LOWEST_INT32)
            top = tl.maximum(top, tl.max(total, 1))
    if K_SCALE != PER_TOKEN:
        top = top.to(tl.float32) * (row_step * tl.load(k_scale_ptr))
    return top


@triton.jit
def store_part(
    y, b, h, t, Tq, H, out_ptr, out_scale_ptr, out_zero_point_ptr, out_smooth_inv_ptr,
    D: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store outputs START and on of a head into [B, Tq, H, D] memory, as the next layer reads them, or their codes."""
    d = START + tl.arange(0, BLOCK)
    rows = ((b * Tq + t) * H + h) * D
    inside = (t < Tq)[:, None]
    if START + BLOCK > D:
        inside = inside & (d < D)[None, :]
    if out_scale_ptr is not None:
        if out_smooth_inv_ptr is not None:
            y *= tl.load(out_smooth_inv_ptr + h * D + d, mask=d < D, other=0.0)[None, :]
        y = static_codes(y, out_scale_ptr, out_zero_point_ptr)
    at = out_ptr + rows[:, None] + d[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=inside)


def new_output(
    q: torch.Tensor, out_dtype: torch.dtype, out_scale: torch.Tensor | None
) -> torch.Tensor:
    """[B, H, Tq, D] over [B, Tq, H, D] memory; codes if they have a scale."""
    batch, heads, num_queries, head_dim = q.shape
    shape = (batch, num_queries, heads, head_dim)
    dtype = out_dtype if out_scale is None else torch.int8
    return torch.empty(shape, dtype=dtype, device=q.device).transpose(1, 2)


def config_of(
    op: str, k: torch.Tensor, config: tuning.AttentionConfig | None
) -> tuple[tuning.AttentionConfig, int]:
    """The launch to use, and its keys per tile: no more than there are."""
    num_keys, head_dim = k.shape[2:]
    if config is None:
        config = tuning.attention_config(op, tuning.tables_of(k.device), num_keys, head_dim)
    return config, min(config.block_k, max(MIN_BLOCK_K, triton.next_power_of_2(num_keys)))


def scale_kind(scale: torch.Tensor) -> int:
    """ONE, PER_HEAD [H], PER_IMAGE [B, H] or PER_TOKEN [B, H, T]."""
    return ONE.value if scale.numel() == 1 else scale.dim()


def shape_constants(
    head_dim: int, num_keys: int, block_q: int, block_k: int, parts: tuple[int, int]
) -> dict[str, int]:
    """Compile-time sizes of a launch; `parts` are those of the outputs."""
    score_a, score_b = SCORE_PARTS[head_dim]
    return {
        "D": head_dim, "SCORE_A": score_a, "SCORE_B": score_b, "VALUE_A": parts[0], "VALUE_B": parts[1],
        "EVEN_K": num_keys % block_k == 0, "ONE_TILE": num_keys <= block_k,
        "BLOCK_Q": block_q, "BLOCK_K": block_k,
    }  # fmt: skip

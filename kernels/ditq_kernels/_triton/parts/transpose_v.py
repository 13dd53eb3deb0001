"""Values as the int8 product wants them: transposed, zero-padded, with sums of columns, whole or of each tile.

Int8 tensor cores contract along contiguous memory, here along keys. Transposing once costs one read and
one write of V; leaving it to the attention kernel would repeat it for every tile of queries. A sum
of codes turns probabilities stored as `code - 128` back into `code`.
"""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import run_kernel

BLOCK_D = 16
MAX_BLOCK_T = 128


@triton.jit
def _transpose_v_kernel(
    v_ptr, vt_ptr,  # [B, H, T, D] int8, [B * H, WIDTH, PADDED_T] int8
    v_sum_ptr,  # int32 [B * H, WIDTH], or [B * H, tiles, WIDTH]
    T, PADDED_T, H, stride_vb,
    STRIDE_VH: tl.constexpr, STRIDE_VT: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    WHOLE_SUMS: tl.constexpr,  # of all tokens, or of each tile
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // (WIDTH // BLOCK_D)).to(tl.int64)
    d = program % (WIDTH // BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    v_ptr += (head // H) * stride_vb + (head % H) * STRIDE_VH
    vt_ptr += head * WIDTH * PADDED_T
    v_sum_ptr += head * (1 if WHOLE_SUMS else PADDED_T // BLOCK_T) * WIDTH
    total = tl.zeros((BLOCK_D,), tl.int32)
    for start in range(0, PADDED_T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < T)[:, None] & (d < D)[None, :]
        at = v_ptr + t.to(tl.int64)[:, None] * STRIDE_VT + d[None, :]
        v = tl.load(at, mask=inside, other=0)  # [BLOCK_T, BLOCK_D]
        if WHOLE_SUMS:
            total += tl.sum(v.to(tl.int32), 0)
        else:
            tl.store(v_sum_ptr + start // BLOCK_T * WIDTH + d, tl.sum(v.to(tl.int32), 0))
        tl.store(vt_ptr + d[:, None] * PADDED_T + t[None, :], tl.trans(v))
    if WHOLE_SUMS:
        tl.store(v_sum_ptr + d, total)


def launch(
    v: torch.Tensor, width: int, block_k: int, whole_sums: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, T, width] int8 codes over [B, H, width, padded T] memory, and int32 sums [B * H, 1 or tiles, width].

    T is padded with zeros to tiles of block_k; sums of tiles need block_k of at most MAX_BLOCK_T.
    """
    v = v if v.stride(3) == 1 else v.contiguous()
    batch, heads, num_tokens, head_dim = v.shape
    padded = triton.cdiv(num_tokens, block_k) * block_k
    vt = torch.empty((batch * heads, width, padded), dtype=torch.int8, device=v.device)
    tiles = 1 if whole_sums else padded // block_k
    v_sum = torch.empty((batch * heads, tiles, width), dtype=torch.int32, device=v.device)
    run_kernel(
        _transpose_v_kernel, (batch * heads * (width // BLOCK_D),),
        v, vt, v_sum, num_tokens, padded, heads, v.stride(0),
        STRIDE_VH=v.stride(1), STRIDE_VT=v.stride(2),
        D=head_dim, WIDTH=width, BLOCK_D=BLOCK_D, BLOCK_T=min(block_k, MAX_BLOCK_T),
        WHOLE_SUMS=whole_sums,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return vt.view(batch, heads, width, padded)[..., :num_tokens].transpose(2, 3), v_sum

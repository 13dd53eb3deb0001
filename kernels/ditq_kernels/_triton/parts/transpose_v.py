"""Values as the int8 product wants them: transposed, zero-padded, with the sum of each column.

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
    v_ptr, vt_ptr, v_sum_ptr,  # [B, H, T, D] int8, [B * H, WIDTH, PADDED_T] int8, [B * H, WIDTH] int32
    T, PADDED_T, H, stride_vb,
    STRIDE_VH: tl.constexpr, STRIDE_VT: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // (WIDTH // BLOCK_D)).to(tl.int64)
    d = program % (WIDTH // BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    v_ptr += (head // H) * stride_vb + (head % H) * STRIDE_VH
    vt_ptr += head * WIDTH * PADDED_T
    total = tl.zeros((BLOCK_D,), tl.int32)
    for start in range(0, PADDED_T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < T)[:, None] & (d < D)[None, :]
        at = v_ptr + t.to(tl.int64)[:, None] * STRIDE_VT + d[None, :]
        v = tl.load(at, mask=inside, other=0)  # [BLOCK_T, BLOCK_D]
        total += tl.sum(v.to(tl.int32), 0)
        tl.store(vt_ptr + d[:, None] * PADDED_T + t[None, :], tl.trans(v))
    tl.store(v_sum_ptr + head * WIDTH + d, total)


def launch(v: torch.Tensor, width: int, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, T, width] int8 codes over [B, H, width, padded T] memory, [B * H, width] int32 sums.

    T is padded with zeros to tiles of block_k.
    """
    v = v if v.stride(3) == 1 else v.contiguous()
    batch, heads, num_tokens, head_dim = v.shape
    padded = triton.cdiv(num_tokens, block_k) * block_k
    vt = torch.empty((batch * heads, width, padded), dtype=torch.int8, device=v.device)
    v_sum = torch.empty((batch * heads, width), dtype=torch.int32, device=v.device)
    run_kernel(
        _transpose_v_kernel, (batch * heads * (width // BLOCK_D),),
        v, vt, v_sum, num_tokens, padded, heads, v.stride(0),
        STRIDE_VH=v.stride(1), STRIDE_VT=v.stride(2),
        D=head_dim, WIDTH=width, BLOCK_D=BLOCK_D, BLOCK_T=min(block_k, MAX_BLOCK_T),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return vt.view(batch, heads, width, padded)[..., :num_tokens].transpose(2, 3), v_sum

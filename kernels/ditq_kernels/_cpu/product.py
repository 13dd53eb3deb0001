"""Exact integer products of int8 matrices by `torch._int_mm`.

Torch hands them to oneDNN, which has kernels for processors with AMX, AVX512-VNNI or AVX-VNNI and sums in int32. Both
operands are signed. On other processors it is as exact and 30 times slower than fp32, so `backend` asks first.
"""

import torch

from ditq_kernels import packing

EXPANDED_BYTES = (
    2**24
)  # int8 weights made from 4 bits at a time: a whole layer of DiT-XL, a part of Flux's


def product(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None = None,
    group_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """`q @ weight.T` as int32 [T, N], contiguous and the caller's own.

    Args:
        q: [T, K] int8.
        weight: [N, K] int8; or [N, K / 2] uint8 with group scales and offsets, expanded a block of rows at a time.
        group_scale: [N, J] uint8.
        group_offset: [N, J] int8.
    """
    if group_scale is None or group_offset is None:
        return torch._int_mm(q, weight.t())
    rows = max(1, EXPANDED_BYTES // q.shape[1])
    blocks = zip(*(part.split(rows) for part in (weight, group_scale, group_offset)), strict=True)
    totals = [torch._int_mm(q, packing.expand_w4p(*block).t()) for block in blocks]
    return totals[0] if len(totals) == 1 else torch.cat(totals, dim=1)

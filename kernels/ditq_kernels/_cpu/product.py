"""Exact products of int8 matrices, by what the processor multiplies fastest.

With int8 dot products: `torch._int_mm`, for which oneDNN has kernels with AMX, AVX512-VNNI and AVX-VNNI, in int32.
Without, it is as exact and 30 times slower than fp32, and `pairs` does it, if copies of weights may be kept
(`prepared.keep_copies`); else the reference, which is about as fast as fp32. Weights made under `torch.inference_mode`
would be prepared at every call, so the reference multiplies them.
"""

import functools

import torch

from ditq_kernels._cpu import pairs
from ditq_kernels._cpu.pairs import CODES
from ditq_kernels.codes import packing
from ditq_kernels.launch import cpu_features
from ditq_kernels.launch.prepared import keeps_copies, prepared
from ditq_kernels.reference import linear as reference

CHECKED = (
    (1, 1, 1),
    (1, 1, 2),
    (3, 2, 1),
    (1, 7, 33),
    (5, 1, 64),
    (17, 33, 160),
)  # tokens, outputs, inputs
EXPANDED_BYTES = (
    2**24
)  # int8 weights made from 4 bits at a time: a whole layer of DiT-XL, a part of Flux's


def product(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None = None,
    group_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """`q @ weight.T` [T, N], contiguous and the caller's own: int32, or fp32 if it holds all sums exactly.

    Args:
        q: [T, K] int8.
        weight: [N, K] int8; or [N, K / 2] uint8 with group scales and offsets.
        group_scale: [N, J] uint8.
        group_offset: [N, J] int8.
    """
    groups = () if group_scale is None or group_offset is None else (group_scale, group_offset)
    if cpu_features.int8_dot():
        return _by_dot_products(q, weight, *groups)
    if weight.is_inference() or not keeps_copies():
        return reference.integer_matmul(
            q, packing.expand_w4p(weight, *groups) if groups else weight
        )
    return pairs.product(q, weight, *groups)


def _by_dot_products(q: torch.Tensor, weight: torch.Tensor, *groups: torch.Tensor) -> torch.Tensor:
    """Progressive int4 is expanded a block of rows at a time, or once, if copies may be kept."""
    _check_dot_products()
    if not groups:
        return _int_mm(q, weight)
    if keeps_copies() and not weight.is_inference():
        return _int_mm(q, prepared("gemm_w4a8", (weight, *groups), packing.expand_w4p))
    rows = max(1, EXPANDED_BYTES // q.shape[1])
    blocks = zip(*(part.split(rows) for part in (weight, *groups)), strict=True)
    totals = [_int_mm(q, packing.expand_w4p(*block)) for block in blocks]
    return totals[0] if len(totals) == 1 else torch.cat(totals, dim=1)


def _int_mm(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if (
        q.shape[1] == 1
    ):  # torch 2.13 takes the transposed weight for a matrix of one column, and reads beyond it
        return q.to(torch.int32) * weight.t()
    return torch._int_mm(q, weight.t())


@functools.cache
def _check_dot_products() -> None:
    """Multiply the extremes of int8 once a process, at the shapes that libraries treat apart.

    Raises:
        RuntimeError: a product is wrong.
    """
    low, high = CODES
    for tokens, outputs, inputs in CHECKED:
        q = torch.full((tokens, inputs), low, dtype=torch.int8, device="cpu")
        weight = torch.full((outputs, inputs), low, dtype=torch.int8, device="cpu")
        q[:, ::3], weight[:, 1::5] = high, high
        q[::2, inputs // 2 :], weight[1::2] = high, high
        if not torch.equal(_int_mm(q, weight), reference.integer_matmul(q, weight)):
            raise RuntimeError(
                f"gemm on the CPU: torch's int8 product of [{tokens}, {inputs}] and [{inputs}, {outputs}] is not "
                "exact on this processor; choose the backend 'reference', and report the processor (`ditq doctor`)"
            )

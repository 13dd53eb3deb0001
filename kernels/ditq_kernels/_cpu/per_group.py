"""Sums over int4 weights with a real scale per group, a block of outputs at a time.

Every group adds its integer product, scaled, to fp32 sums. The reference goes over all [T, N] values for each group;
sums of a block stay in the cache through all of them. A group's integers are small enough for an fp32 product to be
exact, also with the zero point taken out before.
"""

import torch

from ditq_kernels.codes import packing
from ditq_kernels.reference import linear as reference

BLOCK_ELEMENTS = 2**18  # 1 MiB of fp32 sums, as much of products
LARGEST_PRODUCT = 255 * 15


def scaled_sums(
    q: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    zero_point: torch.Tensor | None,
) -> torch.Tensor:
    """`(q - zero_point) @ weight.T` in real weights, fp32 [T, N], contiguous and the caller's own.

    Each step is one fp32 rounding, groups in ascending order; arguments as in `per_group.gemm_w4a8_per_group`.
    """
    group_size = q.shape[1] // weight_scale.shape[1]
    exact = reference.exact_dtype(q.device, LARGEST_PRODUCT * group_size)
    centred = q.to(exact) if zero_point is None else q.to(exact).sub_(zero_point[:, None])
    columns = centred.split(group_size, dim=1)
    out = centred.new_empty((len(q), len(packed)), dtype=torch.float32)
    step = max(1, BLOCK_ELEMENTS // max(1, len(q)))
    for start in range(0, len(packed), step):
        rows = slice(start, start + step)
        weight = packing.expand_w4g(packed[rows], weight_zero[rows]).to(exact)
        y = out.new_zeros((len(q), len(weight)))
        for group, part in enumerate(weight.split(group_size, dim=1)):
            y += (columns[group] @ part.t()).float().mul_(weight_scale[rows, group])
        out[:, rows] = y
    return out

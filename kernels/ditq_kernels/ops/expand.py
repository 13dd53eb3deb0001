"""Int8 weights from progressive int4 codes, so that a layer can keep 4 bits on disk and run at 8."""

import torch

from ditq_kernels.checks import tensors as checks
from ditq_kernels.ops import dispatch


def w4_expand(
    packed: torch.Tensor, group_scale: torch.Tensor, group_offset: torch.Tensor
) -> torch.Tensor:
    """Int8 weights `code * group_scale + group_offset`, as `expand_w4p` gives them, in one pass on CUDA.

    `gemm_w8a8` on the result equals `gemm_w4a8` on the codes, bit for bit.

    Args:
        packed: [N, K / 2] uint8, rows contiguous. Weight codes as `pack_int4` stores them.
        group_scale: [N, J] uint8 in 1..17, K / J a multiple of 32.
        group_offset: [N, J] int8. Expanded weights must stay inside int8, as our packer ensures.

    Returns:
        [N, K] int8, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or layout.
    """
    arguments = (packed, group_scale, group_offset)
    if (made := dispatch.w4_expand.by_plan(arguments)) is not None:
        return made
    checks.check_groups("w4_expand", *arguments, like=packed)
    return dispatch.w4_expand(*arguments)

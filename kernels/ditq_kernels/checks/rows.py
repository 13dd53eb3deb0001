"""Checks of what quantizers of rows take: activations, smoothing, shifts of timestep groups, given scales.

As in `tensors`, each raises ValueError with one sentence.
"""

import torch

from ditq_kernels.checks import gemm as checks_gemm
from ditq_kernels.checks import tensors as checks


def check_rows(
    op: str, x: torch.Tensor, smooth_inv: torch.Tensor | None, asymmetric: bool = False
) -> None:
    """Activations [T, K] whose codes a GEMM can take, and a smoothing [K]."""
    checks.check_matrix(op, "x", x, checks.FLOATS, "[T, K]")
    checks.check_accumulator(op, x.shape[1], asymmetric)
    if smooth_inv is not None:
        checks.check_vector(op, "smooth_inv", smooth_inv, torch.float32, (x.shape[1],), like=x)


def check_shift(
    op: str,
    x: torch.Tensor,
    group_shift: torch.Tensor | None,
    group_index: torch.Tensor | None,
) -> None:
    """One shift, or one for each group and a group for each sample."""
    if group_shift is None:
        if group_index is not None:
            raise ValueError(
                f"{op}: group_index goes with group_shift, which is missing; pass both or neither"
            )
        return
    checks.check_matrix(op, "group_shift", group_shift, (torch.float32,), "[G, K]")
    checks.check_device(op, "group_shift", group_shift, x)
    if group_shift.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: group_shift must be [G, {x.shape[1]}], got {list(group_shift.shape)}; "
            "pass the shifts of this site"
        )
    check_contiguous_shift(op, group_shift)
    if group_index is not None:
        length = (group_index.numel(),)
        checks.check_vector(op, "group_index", group_index, torch.int64, length, like=x)
        checks_gemm.check_samples(op, "group_index", group_index.numel(), x.shape[0])
    elif len(group_shift) != 1:
        raise ValueError(
            f"{op}: group_shift of {len(group_shift)} groups needs group_index, which is missing; "
            "pass the group of each sample, or one shift"
        )


def check_contiguous_shift(op: str, group_shift: torch.Tensor) -> None:
    """A table without gaps."""
    if not group_shift.is_contiguous():
        raise ValueError(
            f"{op}: group_shift must be contiguous, got strides {tuple(group_shift.stride())}; "
            "call .contiguous()"
        )


def check_given_scale(
    op: str,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    asymmetric: bool,
) -> None:
    """One scale with its zero point, for static codes; or neither, for codes per token."""
    if (scale is None) != (zero_point is None):
        missing = "scale" if scale is None else "zero_point"
        raise ValueError(
            f"{op}: scale and zero_point go together, {missing} is missing; pass both for static codes, "
            "neither for a scale per token"
        )
    if scale is None or zero_point is None:
        return
    if asymmetric:
        raise ValueError(
            f"{op}: asymmetric asks for a zero point per token, got a given scale and zero_point; "
            "leave one of them out"
        )
    checks.check_vector(op, "scale", scale, torch.float32, (1,), like=x)
    checks.check_vector(op, "zero_point", zero_point, torch.int32, (1,), like=x)

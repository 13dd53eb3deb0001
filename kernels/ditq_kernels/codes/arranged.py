"""Int4 weights in the order that kernels read: the same tensors, shapes, dtypes and bytes, in another order.

The file's order of nibbles would need a byte shuffle per fragment (2.5x the loop instructions on sm_80), so the bytes
of a row are permuted once (`packing.split_for_kernel`), within units of inputs. What belongs to groups keeps its
values; in memory neighbouring channels lie side by side, strides (1, N). That tells the order, wherever the tensors go.

What a kernel would have to pad is not arranged: inputs that are no whole units. Nor is one row, or one group, whose
strides would tell nothing.
"""

import torch

from ditq_kernels.codes import packing

Parts = tuple[torch.Tensor, ...]


def unit_of(kind: str, packed: torch.Tensor, per_group: torch.Tensor) -> int:
    """Inputs whose bytes are permuted together.

    Args:
        kind: "w4p" or "w4g".
        packed: [N, K / 2] uint8.
        per_group: [N, J], any.
    """
    in_features = 2 * packed.shape[1]
    group_size = in_features // per_group.shape[1]
    if kind == "w4p":
        return packing.kernel_unit(in_features, group_size)
    return packing.kernel_span(group_size)


def can_arrange(kind: str, packed: torch.Tensor, per_group: torch.Tensor) -> bool:
    """Whether kernel order needs no padding, and strides can tell it; arguments as in `unit_of`."""
    if packed.shape[0] < 2 or per_group.shape[1] < 2:
        return False
    return 2 * packed.shape[1] % unit_of(kind, packed, per_group) == 0


def arrange(kind: str, packed: torch.Tensor, *per_group: torch.Tensor) -> Parts:
    """Weights that `can_arrange` in kernel order.

    Args:
        kind: "w4p" or "w4g".
        packed: [N, K / 2] uint8 in file order.
        per_group: each [N, J]: group_scale, group_offset; or weight_scale, weight_zero, perhaps weight_sum.

    Returns:
        All of them, of the same shapes and dtypes.
    """
    split = packing.split_for_kernel(packed, unit_of(kind, packed, per_group[0]))
    return split, *(part.t().contiguous().t() for part in per_group)


def in_file_order(kind: str, packed: torch.Tensor, *per_group: torch.Tensor) -> Parts:
    """Weights of either order in the file's, contiguous; the inverse of `arrange`."""
    if not packing.is_arranged(per_group[0]):
        return packed, *per_group
    unit = unit_of(kind, packed, per_group[0])
    codes = packing.unsplit_from_kernel(packed, unit, 2 * packed.shape[1])
    plain = torch.contiguous_format
    return codes, *(part.clone(memory_format=plain) for part in per_group)

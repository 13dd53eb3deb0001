"""Checks at the public edge of the ops; below it everything is trusted.

Each check raises ValueError with one sentence: op, what was expected, what came, what to do.
"""

import torch

from ditq_kernels.codes.packing import GROUP_MULTIPLE, is_arranged

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# int32 holds the whole sum of K products, also at the extremes of int8
MAX_K_SYMMETRIC = (2**31 - 1) // (128 * 128)
MAX_K_ASYMMETRIC = (2**31 - 1) // (255 * 128)
MAX_ROW_STEP = (
    2**31 - 1
) // 256  # elements from row to row: int32 counts inside of a tile, of at most 256 rows
MAX_GROUP = (2**31 - 1) // (255 * 15)  # inputs of a group of int4 weights, with any zero points


def check_matrix(
    op: str, name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: str
) -> None:
    """A 2-D tensor of one of the dtypes, whose rows are contiguous and not empty."""
    if tensor.dim() != 2 or tensor.dtype not in dtypes:
        raise ValueError(
            f"{op}: {name} must be {shape} {names_of(dtypes)}, got {describe(tensor)}; "
            "flatten leading dimensions and convert it"
        )
    if tensor.shape[1] == 0:
        raise ValueError(f"{op}: {name} must have columns, got {describe(tensor)}; drop the call")
    if tensor.stride(1) != 1 and tensor.shape[1] != 1:
        raise ValueError(
            f"{op}: rows of {name} must be contiguous, got strides {tuple(tensor.stride())}; "
            "call .contiguous()"
        )
    if tensor.stride(0) > MAX_ROW_STEP and tensor.shape[0] > 1:
        raise ValueError(
            f"{op}: rows of {name} must be at most {MAX_ROW_STEP} elements apart, got strides "
            f"{tuple(tensor.stride())}; call .contiguous()"
        )


def check_vector(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    like: torch.Tensor,
) -> None:
    """A contiguous 1-D tensor of the dtype, of one of the lengths, on the device of `like`."""
    if tensor.dim() != 1 or tensor.dtype != dtype or tensor.shape[0] not in lengths:
        expected = " or ".join(f"[{length}]" for length in dict.fromkeys(lengths))
        raise ValueError(
            f"{op}: {name} must be {expected} {names_of((dtype,))}, got {describe(tensor)}; "
            "pass one value per row of the tensor it belongs to"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, got stride {tensor.stride(0)}; call .contiguous()"
        )
    check_device(op, name, tensor, like)


def check_head_scales(op: str, scale: torch.Tensor, like: torch.Tensor) -> None:
    """One fp32 scale, or one for each head of the columns of [T, K]."""
    heads, in_features = scale.numel(), like.shape[1]
    if heads == 0 or in_features % heads:
        raise ValueError(
            f"{op}: scale must be [1] or [H] where H divides K={in_features}, got {describe(scale)}; "
            "pass one value per head"
        )
    check_vector(op, "scale", scale, torch.float32, (heads,), like)


def check_device(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    """Both tensors on one device."""
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on {like.device} like the activations, got {tensor.device}; "
            "move it with .to()"
        )


def check_out_dtype(op: str, out_dtype: torch.dtype) -> None:
    """A dtype the epilogue can write."""
    if out_dtype not in FLOATS:
        raise ValueError(
            f"{op}: out_dtype must be {names_of(FLOATS)}, got {out_dtype}; convert the result instead"
        )


def check_inner(op: str, got: int, in_features: int, name: str) -> None:
    """Weights and activations agree on K."""
    if got != in_features:
        raise ValueError(
            f"{op}: activations and {name} must share K, got K={in_features} and K={got}; "
            "pass the weights of this layer"
        )


def check_accumulator(op: str, in_features: int, asymmetric: bool) -> None:
    """K small enough for an int32 sum."""
    limit = MAX_K_ASYMMETRIC if asymmetric else MAX_K_SYMMETRIC
    if in_features > limit:
        raise ValueError(
            f"{op}: K must be at most {limit} for the int32 sum not to overflow, got "
            f"K={in_features}; split the layer along K"
        )


def check_groups(
    op: str,
    packed: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    like: torch.Tensor,
) -> None:
    """Progressive int4 weights whose parts agree; the group size is K / J."""
    parts = (("group_scale", group_scale, torch.uint8), ("group_offset", group_offset, torch.int8))
    _check_group_parts(op, packed, parts, like)
    in_features, num_groups = 2 * packed.shape[1], group_scale.shape[1]
    if in_features % num_groups or (in_features // num_groups) % GROUP_MULTIPLE:
        raise ValueError(
            f"{op}: K / J must be a whole multiple of {GROUP_MULTIPLE}, got K={in_features}, "
            f"J={num_groups}; repack with resolve_group_size"
        )


def check_real_groups(
    op: str,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    like: torch.Tensor,
) -> None:
    """Int4 weights with a real scale per group whose parts agree; the group size is K / J."""
    parts = (
        ("weight_scale", weight_scale, torch.float32),
        ("weight_zero", weight_zero, torch.uint8),
    )
    _check_group_parts(op, packed, parts, like)
    in_features, num_groups = 2 * packed.shape[1], weight_scale.shape[1]
    size = in_features // num_groups
    if in_features % num_groups or (num_groups > 1 and size % GROUP_MULTIPLE):
        raise ValueError(
            f"{op}: K / J must be a whole multiple of {GROUP_MULTIPLE}, or J must be 1, got K={in_features}, "
            f"J={num_groups}; repack with resolve_group_size"
        )
    if size > MAX_GROUP:
        raise ValueError(
            f"{op}: a group must have at most {MAX_GROUP} inputs for its int32 sum not to overflow, got "
            f"{size}; repack with smaller groups"
        )


def check_group_sums(
    op: str, weight_sum: torch.Tensor, weight_scale: torch.Tensor, like: torch.Tensor
) -> None:
    """One int32 sum for each weight scale."""
    in_kernel_order = is_arranged(weight_scale)
    check_group_part(op, "weight_sum", weight_sum, torch.int32, in_kernel_order)
    if weight_sum.shape != weight_scale.shape:
        raise ValueError(
            f"{op}: weight_sum must be [N, J] = {list(weight_scale.shape)} like weight_scale, got "
            f"{list(weight_sum.shape)}; take W4G.weight_sum()"
        )
    check_device(op, "weight_sum", weight_sum, like)


def _check_group_parts(
    op: str,
    packed: torch.Tensor,
    parts: tuple[tuple[str, torch.Tensor, torch.dtype], ...],
    like: torch.Tensor,
) -> None:
    """Packed codes and two tensors [N, J] that belong to them, in one order (`codes.arranged`), on one device."""
    check_matrix(op, "packed", packed, (torch.uint8,), "[N, K / 2]")
    in_kernel_order = parts[0][1].dim() == 2 and is_arranged(parts[0][1])
    for name, tensor, dtype in parts:
        check_group_part(op, name, tensor, dtype, in_kernel_order)
        expected = (packed.shape[0], parts[0][1].shape[1])
        if tensor.shape != expected:
            names = " and ".join(part[0] for part in parts)
            raise ValueError(
                f"{op}: {name} must be [N, J] with N={packed.shape[0]} and one J for {names}, got "
                f"{list(tensor.shape)}; pass the parts of one quantized weight"
            )
        check_device(op, name, tensor, like)
    check_device(op, "packed", packed, like)


def check_group_part(
    op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype, in_kernel_order: bool
) -> None:
    """A tensor [N, J] with contiguous rows, or with contiguous columns where weights are in kernel order."""
    turned = in_kernel_order and tensor.dim() == 2
    check_matrix(op, name, tensor.t() if turned else tensor, (dtype,), "[N, J]")
    if turned and tensor.stride(1) != tensor.shape[0]:
        raise ValueError(
            f"{op}: columns of {name} must follow each other like those of weights in kernel order, got strides "
            f"{tuple(tensor.stride())}; pass all parts of one quantized weight"
        )


def check_zero_point(
    op: str, zero_point: torch.Tensor | None, weight_sum: torch.Tensor | None
) -> None:
    """Zero point and weight sum come together."""
    if (zero_point is None) != (weight_sum is None):
        missing = "zero_point" if zero_point is None else "weight_sum"
        raise ValueError(
            f"{op}: zero_point and weight_sum go together, {missing} is missing; pass "
            "weight_sum = qweight.sum(1, dtype=torch.int32), or neither for symmetric activations"
        )


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    """`float32 | float16`, for sentences."""
    return " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def describe(tensor: torch.Tensor) -> str:
    """Shape and dtype, for sentences."""
    return f"{list(tensor.shape)} {names_of((tensor.dtype,))}"

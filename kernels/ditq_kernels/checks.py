"""Checks at the public edge of the ops; below it everything is trusted.

Each check raises ValueError with one sentence: op, what was expected, what came, what to do.
"""

import math

import torch

from ditq_kernels.packing import GROUP_MULTIPLE

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# int32 holds the whole sum of K products, also at the extremes of int8
MAX_K_SYMMETRIC = (2**31 - 1) // (128 * 128)
MAX_K_ASYMMETRIC = (2**31 - 1) // (255 * 128)
MAX_GROUP = (2**31 - 1) // (255 * 15)  # inputs of a group of int4 weights, with any zero points
MAX_KEYS = (2**31 - 1) // (255 * 255)  # of probability codes times values with a zero point

HEAD_DIMS = (32, 64, 72, 88, 96, 128)  # of attention


def check_matrix(
    op: str, name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: str
) -> None:
    """A 2-D tensor of one of the dtypes, whose rows are contiguous and not empty."""
    if tensor.dim() != 2 or tensor.dtype not in dtypes:
        raise ValueError(
            f"{op}: {name} must be {shape} {_names(dtypes)}, got {_describe(tensor)}; "
            "flatten leading dimensions and convert it"
        )
    if tensor.shape[1] == 0:
        raise ValueError(f"{op}: {name} must have columns, got {_describe(tensor)}; drop the call")
    if tensor.stride(1) != 1 and tensor.shape[1] != 1:
        raise ValueError(
            f"{op}: rows of {name} must be contiguous, got strides {tuple(tensor.stride())}; "
            "call .contiguous()"
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
            f"{op}: {name} must be {expected} {_names((dtype,))}, got {_describe(tensor)}; "
            "pass one value per row of the tensor it belongs to"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, got stride {tensor.stride(0)}; call .contiguous()"
        )
    check_device(op, name, tensor, like)


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
            f"{op}: out_dtype must be {_names(FLOATS)}, got {out_dtype}; convert the result instead"
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
    check_matrix(op, "weight_sum", weight_sum, (torch.int32,), "[N, J]")
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
    """Packed codes and two tensors [N, J] that belong to them, all on one device."""
    check_matrix(op, "packed", packed, (torch.uint8,), "[N, K / 2]")
    for name, tensor, dtype in parts:
        check_matrix(op, name, tensor, (dtype,), "[N, J]")
        expected = (packed.shape[0], parts[0][1].shape[1])
        if tensor.shape != expected:
            names = " and ".join(part[0] for part in parts)
            raise ValueError(
                f"{op}: {name} must be [N, J] with N={packed.shape[0]} and one J for {names}, got "
                f"{list(tensor.shape)}; pass the parts of one quantized weight"
            )
        check_device(op, name, tensor, like)
    check_device(op, "packed", packed, like)


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


def check_attention(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, v_dtype: torch.dtype
) -> None:
    """Queries, keys and values that fit together, of a head dimension that has kernels."""
    named = (("q", q, torch.int8), ("k", k, torch.int8), ("v", v, v_dtype))
    for name, tensor, dtype in named:
        if tensor.dim() != 4 or tensor.dtype != dtype:
            raise ValueError(
                f"{op}: {name} must be [B, H, T, D] {_names((dtype,))}, got {_describe(tensor)}; "
                "split the heads and convert it"
            )
        if tensor.stride(3) != 1:
            raise ValueError(
                f"{op}: rows of {name} must be contiguous, got strides {tuple(tensor.stride())}; "
                "call .contiguous()"
            )
        check_device(op, name, tensor, like=q)
    batch, heads, _, head_dim = q.shape
    for name, tensor, _ in named[1:]:
        expected = (batch, heads, k.shape[2], head_dim)
        if tensor.shape != expected or tensor.shape[2] == 0:
            raise ValueError(
                f"{op}: {name} must be [B, H, Tk, D] with B={batch}, H={heads}, D={head_dim} as in q "
                f"and one Tk of at least 1 for k and v, got {list(tensor.shape)}; "
                "repeat grouped heads, which are not supported"
            )
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"{op}: the head dimension must be one of {HEAD_DIMS}, got {head_dim}; "
            "pad with zero columns, or use torch's scaled_dot_product_attention"
        )


def check_attention_sum(op: str, num_keys: int) -> None:
    """Few enough keys for an int32 sum of probability codes times values."""
    if num_keys > MAX_KEYS:
        raise ValueError(
            f"{op}: Tk must be at most {MAX_KEYS} for the int32 sum not to overflow, got "
            f"Tk={num_keys}; use attention_qk_int8_pv_bf16"
        )


def check_attention_scale(
    op: str, name: str, scale: torch.Tensor, finest: torch.Size, like: torch.Tensor
) -> None:
    """A contiguous fp32 scale: one, one a head, or one for each element of the shape `finest`."""
    shapes = ((1,), (like.shape[1],), tuple(finest))
    if scale.dtype != torch.float32 or tuple(scale.shape) not in shapes:
        expected = ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(
            f"{op}: {name} must be float32 of shape {expected}, got {_describe(scale)}; "
            "pass one value, one per head, or one for each of the last shape"
        )
    if not scale.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, got strides {tuple(scale.stride())}; "
            "call .contiguous()"
        )
    check_device(op, name, scale, like)


def check_softmax_scale(op: str, softmax_scale: float) -> None:
    """A positive, finite multiplier of the logits."""
    if not 0.0 < softmax_scale < math.inf:
        raise ValueError(
            f"{op}: softmax_scale must be positive and finite, got {softmax_scale}; "
            "it is usually D ** -0.5"
        )


def check_key_mask(op: str, key_mask: torch.Tensor, like: torch.Tensor) -> None:
    """A contiguous bool mask over the keys of each image."""
    expected = (like.shape[0], like.shape[2])
    if key_mask.dtype != torch.bool or tuple(key_mask.shape) != expected:
        raise ValueError(
            f"{op}: key_mask must be [B, Tk] = {list(expected)} bool, True where a key is attended, got "
            f"{_describe(key_mask)}; biases, causal masks and masks per head or query are not supported"
        )
    if not key_mask.is_contiguous():
        raise ValueError(
            f"{op}: key_mask must be contiguous, got strides {tuple(key_mask.stride())}; "
            "call .contiguous()"
        )
    check_device(op, "key_mask", key_mask, like)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {_names((tensor.dtype,))}"

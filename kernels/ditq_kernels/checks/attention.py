"""Checks of attention at the public edge; as in `checks`, each raises with one sentence."""

import math

import torch

from ditq_kernels.checks import tensors as checks

HEAD_DIMS = (32, 64, 72, 88, 96, 128)
MAX_STRICT_KEYS = (2**31 - 1) // (255 * 255)  # of probability codes times values with a zero point


def check_attention(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, v_dtype: torch.dtype
) -> None:
    """Queries, keys and values that fit together, of a head dimension that has kernels."""
    named = (("q", q, torch.int8), ("k", k, torch.int8), ("v", v, v_dtype))
    for name, tensor, dtype in named:
        if tensor.dim() != 4 or tensor.dtype != dtype:
            raise ValueError(
                f"{op}: {name} must be [B, H, T, D] {checks.names_of((dtype,))}, got {checks.describe(tensor)}; "
                "split the heads and convert it"
            )
        if tensor.stride(3) != 1 and not (name == "v" and has_tokens_inside(tensor)):
            raise ValueError(
                f"{op}: rows of {name} must be contiguous, got strides {tuple(tensor.stride())}; "
                "call .contiguous()"
            )
        checks.check_device(op, name, tensor, like=q)
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


def has_tokens_inside(v: torch.Tensor) -> bool:
    """Whether int8 values [B, H, Tk, D] lie in [B, H, D, T'] memory, T' at least Tk: as their product reads them."""
    return v.dtype == torch.int8 and v.stride(2) == 1 and v.stride(3) >= max(2, v.shape[2])


def check_strict_sum(op: str, num_keys: int, strict: bool) -> None:
    """Few enough keys for one int32 sum of probability codes times values, where it must be one."""
    if strict and num_keys > MAX_STRICT_KEYS:
        raise ValueError(
            f"{op}: Tk must be at most {MAX_STRICT_KEYS} where strict asks for one int32 sum, got "
            f"Tk={num_keys}; leave strict out, or use attention_qk_int8_pv_bf16"
        )


def check_attention_scale(
    op: str, name: str, scale: torch.Tensor, finest: torch.Size, like: torch.Tensor
) -> None:
    """A contiguous fp32 scale: one, one a head, or one for each element of the shape `finest`."""
    shapes = ((1,), (like.shape[1],), tuple(finest))
    if scale.dtype != torch.float32 or tuple(scale.shape) not in shapes:
        expected = ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(
            f"{op}: {name} must be float32 of shape {expected}, got {checks.describe(scale)}; "
            "pass one value, one per head, or one for each of the last shape"
        )
    if not scale.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, got strides {tuple(scale.stride())}; "
            "call .contiguous()"
        )
    checks.check_device(op, name, scale, like)


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
            f"{checks.describe(key_mask)}; biases, causal masks and masks per head or query are not supported"
        )
    if not key_mask.is_contiguous():
        raise ValueError(
            f"{op}: key_mask must be contiguous, got strides {tuple(key_mask.stride())}; "
            "call .contiguous()"
        )
    checks.check_device(op, "key_mask", key_mask, like)


def check_attention_output(
    op: str,
    q: torch.Tensor,
    out_dtype: torch.dtype,
    out_scale: torch.Tensor | None,
    out_zero_point: torch.Tensor | None,
    out_smooth_inv: torch.Tensor | None,
) -> None:
    """Floats of one dtype, or codes with one scale and zero point and perhaps the smoothing of the next layer."""
    checks.check_out_dtype(op, out_dtype)
    if out_scale is None:
        named = (("out_zero_point", out_zero_point), ("out_smooth_inv", out_smooth_inv))
        for name, tensor in named:
            if tensor is not None:
                raise ValueError(
                    f"{op}: {name} needs out_scale, which is missing; pass out_scale and out_zero_point for "
                    "codes, or none of them"
                )
        return
    if out_zero_point is None:
        raise ValueError(
            f"{op}: out_scale needs out_zero_point, which is missing; pass torch.zeros(1, dtype=torch.int32) "
            "for symmetric codes"
        )
    if out_dtype != torch.float32:
        raise ValueError(
            f"{op}: out_dtype must be left at its default where out_scale asks for int8 codes, got "
            f"{checks.names_of((out_dtype,))}; leave one of them out"
        )
    checks.check_vector(op, "out_scale", out_scale, torch.float32, (1,), like=q)
    checks.check_vector(op, "out_zero_point", out_zero_point, torch.int32, (1,), like=q)
    if out_smooth_inv is not None:
        channels = (q.shape[1] * q.shape[3],)
        checks.check_vector(op, "out_smooth_inv", out_smooth_inv, torch.float32, channels, like=q)

"""The projections of an attention in one GEMM that leaves the int8 codes its two products read."""

from typing import Any

import torch

from ditq_kernels.checks import tensors as checks
from ditq_kernels.ops import dispatch
from ditq_kernels.ops.gemm_fused import Weight, check_layer, parts_of

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def gemm_qkv_quantize(
    q: torch.Tensor,
    weights: tuple[Weight, Weight, Weight],
    scale: torch.Tensor,
    biases: Three | None = None,
    *,
    batch: int,
    head_scales: Three,
    heads: int,
    v_zero_point: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    weight_sums: Three | None = None,
    bias_index: torch.Tensor | None = None,
) -> Three:
    """Queries, keys and values of one quantized input, quantized with static scales (HTG, arXiv:2503.06930).

    With y the layer in fp32, code = zero + clamp(round(y * (1 / head_scale))), inside [-128, 127], as
    `quantize_static` does it. The three weights stay where they are: nothing is concatenated. A scale per token cannot
    be fused here, nor norms, a rotary embedding or low-rank branches.

    Args:
        q: [B * T, K] int8, rows contiguous. Activation codes, image by image.
        weights: of the queries, keys and values, each [H * D, K], contiguous, of one kind and group size.
        scale: [B * T] or [1] fp32. Activation step.
        biases: three of [H * D] fp32; three of [G, H * D] with bias_index.
        batch: B, divides the rows of q.
        head_scales: of the queries, keys and values, each [1] or [H] fp32, positive. Steps of the codes.
        heads: H, divides the rows of each weight.
        v_zero_point: [1] or [H] int32 in [-128, 127]. Code of value 0.0; absent means 0.
        zero_point: as in `gemm_w8a8`.
        weight_sums: three of the `weight_sum` in `gemm_w8a8`; goes with zero_point.
        bias_index: as in `gemm_w8a8`.

    Returns:
        q, k: [B, H, T, D] int8 over [B, T, H, D] memory. v: [B, H, T, D] int8 over [B, H, D, T'] memory, tokens
        contiguous, T' the next multiple of 16; what lies between T and T' is undefined.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or K too large for an int32 sum.
    """
    parts = [parts_of(weight) for weight in weights]
    codes, group_scales, group_offsets = (
        [] if three[0] is None else list(three) for three in zip(*parts, strict=True)
    )
    steps, scales = list(head_scales), [w.scale for w in weights]
    offsets, sums = list(biases or ()), list(weight_sums or ())
    arguments = (
        q, codes, group_scales, group_offsets, steps, v_zero_point, batch, heads,
        scale, scales, offsets, zero_point, sums, bias_index,
    )  # fmt: skip
    given = (
        q, *codes, None, *group_scales, None, *group_offsets, None, *steps, None, v_zero_point, batch, heads,
        scale, *scales, None, *offsets, None, zero_point, *sums, None, bias_index,
    )  # fmt: skip
    if (made := dispatch.gemm_qkv_quantize.by_plan(arguments, given)) is not None:
        return made
    op = "gemm_qkv_quantize"
    _check_count(op, "weights", weights)
    _check_count(op, "head_scales", head_scales)
    for name, three in (("biases", biases), ("weight_sums", weight_sums)):
        if three is not None:
            _check_count(op, name, three)
    for i, weight in enumerate(weights):
        bias, weight_sum = (three and three[i] for three in (biases, weight_sums))
        stages = (scale, weight.scale, bias, zero_point, weight_sum, bias_index, None, None)
        check_layer(op, q, weight, stages)
        _check_alike(op, parts[0], parts[i])
    _check_heads(op, q, len(parts[0][0]), batch, heads)
    for step in head_scales:
        checks.check_vector(op, "head_scales", step, torch.float32, (1, heads), like=q)
    if v_zero_point is not None:
        checks.check_vector(op, "v_zero_point", v_zero_point, torch.int32, (1, heads), like=q)
    return dispatch.gemm_qkv_quantize(*arguments)


def _check_count(op: str, name: str, three: Any) -> None:
    if len(three) != 3:
        raise ValueError(
            f"{op}: {name} must be three, of the queries, keys and values, got {len(three)}; "
            "use the op of one layer for fewer"
        )


def _check_alike(op: str, first: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    """Weights of one kind, shape and group size, contiguous."""
    found = [
        [None if part is None else list(part.shape) for part in parts] for parts in (first, other)
    ]
    if found[0] != found[1] or first[0].dtype != other[0].dtype:
        raise ValueError(
            f"{op}: weights must be of one kind, shape and group size, got {found[0]} and {found[1]}; "
            "run the three layers apart"
        )
    if not other[0].is_contiguous():
        raise ValueError(
            f"{op}: weights must be contiguous, got strides {tuple(other[0].stride())}; call .contiguous()"
        )


def _check_heads(op: str, q: torch.Tensor, out_features: int, batch: int, heads: int) -> None:
    for name, parts, whole in (("batch", batch, len(q)), ("heads", heads, out_features)):
        if parts < 1 or whole % parts:
            raise ValueError(
                f"{op}: {name} must divide {whole}, got {parts}; pass the number of images of q and the "
                "number of heads of the attention"
            )

"""Quantize one folded linear: the lossy step. Float tensors in, the stored tensors of its format out."""

from __future__ import annotations

import torch

import ditq_kernels as k
from ditq_converters.convert.fold import LinearTensors
from ditq_converters.convert.gptq import Feedback, compensated_codes
from ditq_converters.convert.weight_ranges import quantize_clipped
from ditq_converters.methods import Transform, ranges
from ditq_converters.methods.alternating import Quantizer, alternate
from ditq_runtime.format.layer import ZERO_POINT, LayerFormat
from ditq_runtime.format.stored_weight import stored_tensors


def static_range(
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    transform: Transform,
    group_of_call: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The min-max range of a transformed site, over all calls and channels.

    Args:
        minimum: [T, K] fp32 of the untransformed input.
        maximum: [T, K] fp32.
        transform: what happens to the site.
        group_of_call: [T] timestep group of every call.

    Returns:
        low, high: scalars, fp32.
    """
    return ranges.minmax(*ranges.after(minimum, maximum, transform, group_of_call))


def quantize_linear(
    linear: LinearTensors,
    layer_format: LayerFormat,
    feedback: Feedback | None = None,
    symmetric: bool = False,
    ranges: str = "minmax",
    weighed: bool = False,
) -> dict[str, torch.Tensor]:
    """Tensors of `LayerFormat.tensors` for a folded linear.

    Args:
        linear: folded weight [N, K] and bias [G, N], fp64.
        layer_format: what to make.
        feedback: of `gptq.error_feedback` for the folded input; None: round to nearest.
        symmetric: `w4g` weights without zero points.
        ranges: of weights; see `weight_ranges.quantize_clipped`.
        weighed: scales of groups are searched by what an error costs behind the feedback.

    Returns:
        name -> tensor, contiguous.

    Raises:
        ValueError: a weight or a bias is not finite in fp32.
    """
    weight, bias = linear.weight.float(), None if linear.bias is None else linear.bias.float()
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"quantize_linear: the folded {name} is not finite; check the source checkpoint"
            )
    lora: dict[str, torch.Tensor] = {}
    if layer_format.lora_rank:
        quantizer = _quantizer(layer_format, symmetric, ranges)
        weight, lora = _split_branch(linear.weight, layer_format, feedback is not None, quantizer)
    if layer_format.weights == "fp32":
        tensors = {"weight": weight}
    else:
        importance = feedback.importance if feedback is not None and weighed else None
        quantized = quantize_clipped(weight, layer_format, symmetric, ranges, importance)
        if feedback is not None:
            quantized = quantized.with_codes(compensated_codes(weight, feedback, quantized))
        tensors = stored_tensors(quantized, layer_format)
    tensors |= lora
    if layer_format.activations in ZERO_POINT:
        tensors["weight_sum"] = quantized.weight_sum()
    if layer_format.bias:
        assert bias is not None
        tensors["bias"] = bias[0] if layer_format.groups == 1 else bias
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def quantizer_tensors(
    act_range: tuple[torch.Tensor, torch.Tensor] | None, left: Transform | None
) -> dict[str, torch.Tensor]:
    """Tensors of `SiteFormat.tensors` that a site's quantizer applies.

    Args:
        act_range: low and high of the transformed input, for static activations.
        left: what no producer absorbed; shifts by falling timestep, stored by rising.
    """
    tensors: dict[str, torch.Tensor] = {}
    if act_range is not None:
        scale, zero = k.asymmetric_scale(*act_range)
        tensors = {"act_scale": scale.reshape(1), "act_zero": zero.reshape(1)}
    if left is not None and left.smooth is not None:
        tensors["smooth_inv"] = (1 / left.smooth).float()
    if left is not None and left.shift is not None:
        tensors["shift"] = left.shift.flip(0).float().contiguous()
    return tensors


def store_table(table: LinearTensors) -> dict[str, torch.Tensor]:
    """Tensors of a folded modulation table: its factors [N] and its rows [N] or [G, N], fp32; nothing is quantized."""
    assert table.bias is not None
    bias = table.bias[0] if len(table.bias) == 1 else table.bias
    return {"weight": table.weight[:, 0].float(), "bias": bias.float().contiguous()}


def _split_branch(
    weight: torch.Tensor, layer_format: LayerFormat, compensated: bool, quantized: Quantizer
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the codes are made from [N, K] fp32, and the low-rank branch in bf16 (DiTAS Eq. 9-10).

    Two candidates for the codes: the iterate that the optimization kept, and the rest that the rounded branch leaves;
    the grid moves with its input, so either may be closer. Rounding that compensates takes the rest: it must know
    what the codes should stand for.
    """
    split = alternate(weight, quantized, layer_format.lora_rank)
    lora = {"lora_down": split.lora_down.bfloat16(), "lora_up": split.lora_up.bfloat16()}
    branch = lora["lora_up"].double() @ lora["lora_down"].double()
    if compensated:
        return (weight - branch).float(), lora
    targets = (split.quantize_target, weight - branch)
    best = min(targets, key=lambda target: float((quantized(target) + branch - weight).norm()))
    return best.float(), lora


def _quantizer(layer_format: LayerFormat, symmetric: bool, ranges: str) -> Quantizer:
    """Weight -> the weight its codes stand for, [N, K] fp64."""

    def quantized(weight: torch.Tensor) -> torch.Tensor:
        parts = quantize_clipped(weight.float(), layer_format, symmetric, ranges)
        grouped = parts.expand().double().reshape(*parts.scale.shape, -1)  # [N, K] or [N, J, K / J]
        return (grouped * parts.scale.double()[..., None]).reshape(weight.shape)

    return quantized

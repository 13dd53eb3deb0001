"""Kernels of other libraries beside ours at one shape, where they are installed, each as its users call it.

A library that is not there, or needs a GPU, is refused before anything runs. One that then fails, or answers wrongly,
loses its row and says why: its fault is no reason to throw away a run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Call = Callable[[], torch.Tensor]
# int8 steps of both operands, each uniform within half a step of about 1/30 standard deviations
INT8_ERROR = 0.03
# e4m3 keeps 4 bits of each operand: errors up to 2**-4 of it, uniform, so 2**-4 / sqrt(3) each; and sqrt(2) of both
FP8_ERROR = 0.055
# scores of int8 queries and keys, about 1/60 of a standard deviation each, and values in 16 or 8 bits
SAGE_ERROR = 0.05


@dataclass(frozen=True)
class Other:
    """A library.

    Attributes:
        module: what it is imported as.
        name: of its row.
        tolerance: relative Frobenius error against fp64 of the float operands.
        linear: layer and input [T, K] bf16 -> a call of the quantized layer; None if it has none.
        attention: query, key, value [B, H, T, D] bf16 -> a call; None if it has none.
        on_cpu: it runs there.
        why_not: why it cannot be measured at a shape at all.
    """

    module: str
    name: str
    tolerance: float = INT8_ERROR
    linear: Callable[[nn.Linear, torch.Tensor], Call] | None = None
    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Call] | None = None
    on_cpu: bool = False
    why_not: str = ""


def _sdnq(layer: nn.Linear, x: torch.Tensor) -> Call:
    from sdnq import sdnq_post_load_quant

    model = sdnq_post_load_quant(
        nn.Sequential(layer), weights_dtype="int8", use_quantized_matmul=True, add_skip_keys=False,
        minimum_allowed_numel=0,
    )  # fmt: skip
    return lambda: model(x)


def _gemlite(layer: nn.Linear, x: torch.Tensor) -> Call:
    from gemlite.helper import A8W8_int8_dynamic

    made = A8W8_int8_dynamic(device=str(x.device), dtype=x.dtype).from_linear(layer)
    return lambda: made(x)


def _comfy_kitchen(layer: nn.Linear, x: torch.Tensor) -> Call:
    from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout

    weight = QuantizedTensor.from_float(layer.weight, TensorCoreFP8Layout)
    bias = layer.bias

    def run() -> torch.Tensor:
        quantized = QuantizedTensor.from_float(x, TensorCoreFP8Layout)
        return nn.functional.linear(quantized, weight, bias)

    return run


def _sageattention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Call:
    from sageattention import sageattn

    return lambda: sageattn(query, key, value, tensor_layout="HND", is_causal=False)


OTHERS = {
    "sdnq": Other("sdnq", "SDNQ int8", linear=_sdnq, on_cpu=True),
    "comfy-kitchen": Other("comfy_kitchen", "comfy-kitchen fp8", FP8_ERROR, linear=_comfy_kitchen),
    "gemlite": Other("gemlite", "gemlite int8 dynamic", linear=_gemlite),
    "sageattention": Other("sageattention", "SageAttention", SAGE_ERROR, attention=_sageattention),
    "nunchaku": Other(
        "nunchaku", "Nunchaku", why_not="it reads weights that DeepCompressor packed and quantizes none itself",
    ),
}  # fmt: skip


def refusal(name: str, device: torch.device) -> str:
    """Why a library of `OTHERS` cannot be measured on a device; empty if it can."""
    other = OTHERS[name]
    if importlib.util.find_spec(other.module) is None:
        return f"{name} is not installed"
    if other.why_not:
        return other.why_not
    if device.type != "cuda" and not other.on_cpu:
        return f"{name} runs on a CUDA GPU only, and this is {device}"
    return ""


def linear_call(name: str, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> Call:
    """A call of a library's linear of [N, K] and [N] on x [T, K], in bf16."""
    make = OTHERS[name].linear
    assert make is not None
    layer = nn.Linear(
        weight.shape[1], weight.shape[0], device=weight.device, dtype=torch.bfloat16
    ).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return make(layer, x.bfloat16())


def fault(call: Call, check: Callable[[torch.Tensor], float], tolerance: float) -> str:
    """Why a call gets no time: it fails, or is wrong; empty if it gets one."""
    try:
        with torch.no_grad():
            error = check(call())
    except Exception as failed:  # somebody else's code, which may raise anything
        return f"{type(failed).__name__}: {' '.join(str(failed).split())[:160]}"
    return (
        ""
        if error <= tolerance
        else f"its result is off by {error:.2g}, and {tolerance} is allowed"
    )

"""Which implementation an op runs on a device. There is no fallback: what is named here runs.

`choose_backend` changes the answer for the whole process, as torch's own switches do. It is read when an op runs:
compiled models follow it too, captured CUDA graphs keep what they captured.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ditq_kernels.launch import cpu_features, gpus

TRITON_OPS = frozenset(
    {
        "quantize_per_token",
        "quantize_static",
        "quantize_heads",
        "adaln_quantize",
        "gelu_quantize",
        "gemm_w8a8",
        "gemm_w4a8",
        "gemm_w4a8_per_group",
        "gemm_residual",
        "gemm_gelu_quantize",
        "gemm_many",
        "gemm_qkv_quantize",
        "linear_w8",
        "linear_w4",
        "lora_down",
        "w4_expand",
        "attention_qk_int8_pv_int8",
        "attention_qk_int8_pv_bf16",
    }
)
TORCH_OPS = frozenset({"linear_w4_per_group"})
CPU_OPS = frozenset(
    {
        "gemm_w8a8",
        "gemm_w4a8",
        "gemm_w4a8_per_group",
        "gemm_residual",
        "gemm_gelu_quantize",
        "gemm_many",
        "gemm_qkv_quantize",
    }
)
CHOICES = ("auto", "reference", "cpu", "triton")
ATTENTION = "attention"  # ops whose names begin so are not chosen with those of the linears

_reference_on: set[str] = set()  # types of devices for which `choose_backend` said "reference"


def backend_of(op_name: str, device: torch.device | str) -> str:
    """Name of the implementation of an op on a device.

    Args:
        op_name: a public op, such as "gemm_w8a8".
        device: where its tensors live.

    Returns:
        "triton": a Triton kernel. "cpu": torch's int8 GEMMs, on a processor that has fast ones. "torch": plain
        torch, on purpose. "reference": the exact, slow definition.

    Raises:
        ValueError: no op has this name.
    """
    if op_name not in TRITON_OPS and op_name not in TORCH_OPS:
        raise ValueError(
            f"backend_of: op_name must be one of {', '.join(sorted(TRITON_OPS | TORCH_OPS))}, "
            f"got {op_name!r}; check the spelling"
        )
    kind = torch.device(device).type
    if kind in _reference_on and not op_name.startswith(ATTENTION):
        return "reference"
    if kind == "cuda":
        return "triton" if op_name in TRITON_OPS else "torch"
    if kind == "cpu" and op_name in CPU_OPS and cpu_features.int8_gemm():
        return "cpu"
    return "reference"


def choose_backend(name: str, device: torch.device | str) -> None:
    """Choose the implementation of all ops but attention on devices of a type, for this process.

    Args:
        name: "reference"; or "auto", what the device runs best. "cpu" and "triton" are "auto", and insist on it.
        device: "cpu" or a CUDA device.

    Raises:
        ValueError: an unknown name, or one that the device cannot run. Nothing is changed then.
    """
    from ditq_kernels.launch import plans  # not above: it asks this file

    kind = torch.device(device).type
    if name not in CHOICES:
        raise ValueError(f"choose_backend: name must be one of {', '.join(CHOICES)}, got {name!r}")
    reason = why_not(name, device)
    if reason:
        raise ValueError(f"choose_backend: {reason}")
    if name == "reference":
        _reference_on.add(kind)
    else:
        _reference_on.discard(kind)
    plans.clear()  # which would launch what was chosen before


def why_not(name: str, device: torch.device | str) -> str:
    """Why a device cannot run the backend `name` of `CHOICES`; empty if it can."""
    kind = torch.device(device).type
    if name == "triton" and kind != "cuda":
        return f"'triton' needs CUDA tensors, and these are on {device}; move the model, or take 'auto'"
    if name == "triton" and torch.cuda.is_available():
        refused = gpus.why_device_refused(torch.device(device))
        if refused:
            return f"'triton' does not run here: {refused}"
    if name == "cpu" and kind != "cpu":
        return f"'cpu' needs tensors on the CPU, and these are on {device}; move the model, or take 'auto'"
    if name == "cpu" and not cpu_features.int8_gemm():
        able = ", ".join((*cpu_features.INT8_DOT, *cpu_features.PAIRS))
        return (
            f"'cpu' needs torch with oneDNN on a processor with one of {able}, and this is "
            f"{cpu_features.describe()}; take 'auto' or 'reference'"
        )
    return ""


def implementation(
    op_name: str, device: torch.device, reference: Callable[..., Any]
) -> Callable[..., Any]:
    """The function that runs an op on a device; `reference` is its definition.

    Raises:
        RuntimeError: it is a Triton kernel, and Triton cannot be imported.
    """
    backend = backend_of(op_name, device)
    if backend == "triton":
        return load_kernel(op_name).launch
    if backend == "cpu":
        return getattr(importlib.import_module("ditq_kernels._cpu"), op_name)
    return reference


def load_kernel(op_name: str) -> ModuleType:
    """The Triton module of an op; its first use imports Triton.

    Raises:
        RuntimeError: Triton cannot be imported.
    """
    try:
        return importlib.import_module(f"ditq_kernels._triton.{op_name}")
    except ImportError as error:
        raise RuntimeError(
            f"{op_name}: CUDA tensors need Triton, which failed to import ({error}); install "
            "triton>=3.6, or take the slow reference: move the tensors to the CPU, or choose 'reference'"
        ) from error

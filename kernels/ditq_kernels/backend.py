"""Which implementation an op runs on a device. There is no fallback: what is named here runs."""

import importlib
from types import ModuleType

import torch

TRITON_OPS = frozenset(
    {
        "quantize_per_token",
        "quantize_static",
        "adaln_quantize",
        "gelu_quantize",
        "gemm_w8a8",
        "gemm_w4a8",
        "gemm_w4a8_per_group",
        "gemm_residual",
        "gemm_gelu_quantize",
        "linear_w8",
        "linear_w4",
        "lora_down",
        "w4_expand",
        "attention_qk_int8_pv_int8",
        "attention_qk_int8_pv_bf16",
    }
)
TORCH_OPS = frozenset({"linear_w4_per_group"})


def backend_of(op_name: str, device: torch.device | str) -> str:
    """Name of the implementation of an op on a device.

    Args:
        op_name: a public op, such as "gemm_w8a8".
        device: where its tensors live.

    Returns:
        "triton": a Triton kernel. "torch": plain torch, on purpose. "reference": the exact, slow
        definition.

    Raises:
        ValueError: no op has this name.
    """
    if op_name not in TRITON_OPS | TORCH_OPS:
        raise ValueError(
            f"backend_of: op_name must be one of {', '.join(sorted(TRITON_OPS | TORCH_OPS))}, "
            f"got {op_name!r}; check the spelling"
        )
    if torch.device(device).type != "cuda":
        return "reference"
    return "triton" if op_name in TRITON_OPS else "torch"


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
            "triton>=3.6, or move the tensors to the CPU for the slow reference"
        ) from error

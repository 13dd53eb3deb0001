"""What the package exports, and that importing it is free."""

import subprocess
import sys

import pytest
import torch

import ditq_kernels as k
from ditq_kernels.launch import backend, cpu_features

EXPORTED = [
    "INT8_LEVELS",
    "INT8_MAX",
    "MIN_SCALE",
    "W4G",
    "W4P",
    "W8",
    "adaln_quantize",
    "asymmetric_scale",
    "attention_qk_int8_pv_bf16",
    "attention_qk_int8_pv_int8",
    "backend_of",
    "choose_backend",
    "copied_bytes",
    "dequantize",
    "dequantize_w4g",
    "expand_w4g",
    "expand_w4p",
    "fits_w4g",
    "gelu_quantize",
    "gemm_gelu_quantize",
    "gemm_many",
    "gemm_qkv_quantize",
    "gemm_residual",
    "gemm_w4a8",
    "gemm_w4a8_per_group",
    "gemm_w8a8",
    "keep_copies",
    "keeps_copies",
    "linear_w4",
    "linear_w4_per_group",
    "linear_w8",
    "lora_down",
    "pack_int4",
    "quantize_asymmetric",
    "quantize_heads",
    "quantize_per_token",
    "quantize_static",
    "quantize_symmetric",
    "quantize_weight_w4g",
    "quantize_weight_w4p",
    "quantize_weight_w8",
    "resolve_group_size",
    "symmetric_scale",
    "unpack_int4",
    "w4_expand",
]


def test_exported_names_are_guarded():
    assert k.__all__ == EXPORTED
    assert all(getattr(k, name).__doc__ for name in EXPORTED if callable(getattr(k, name)))


def test_importing_loads_neither_triton_nor_cuda():
    program = (
        "import sys, torch, ditq_kernels as k;"
        "assert 'triton' not in sys.modules; assert not torch.cuda.is_initialized();"
        "q, s = k.quantize_per_token(torch.ones(2, 32)); k.gemm_w8a8(q, q, s, s);"
        "ours = [m for m in sys.modules if m.startswith('ditq_kernels._triton')];"
        "assert not ours, ours; assert not torch.cuda.is_initialized()"
    )  # calling any custom op makes torch look for Triton, so only the import is asserted free of it
    path = {"PYTHONPATH": k.__path__[0].removesuffix("/ditq_kernels"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("op", "on_cuda"),
    [
        ("quantize_per_token", "triton"),
        ("gemm_w4a8", "triton"),
        ("gemm_w4a8_per_group", "triton"),
        ("lora_down", "triton"),
        ("attention_qk_int8_pv_int8", "triton"),
        ("attention_qk_int8_pv_bf16", "triton"),
        ("linear_w8", "triton"),
        ("linear_w4", "triton"),
        ("linear_w4_per_group", "torch"),
    ],
)
def test_backend_of(op, on_cuda):
    fast = op in backend.CPU_OPS and cpu_features.int8_gemm()  # test_cpu.py has all kinds
    assert k.backend_of(op, torch.device("cpu")) == ("cpu" if fast else "reference")
    assert k.backend_of(op, torch.device("cuda", 0)) == on_cuda


def test_backend_of_refuses_unknown_ops():
    with pytest.raises(ValueError, match=r"op_name must be one of adaln_quantize, .* got 'gemm'"):
        k.backend_of("gemm", torch.device("cpu"))


def test_every_op_has_a_backend_and_every_triton_op_a_kernel():
    ops = {n for n in k.__all__ if n.startswith(("attention", "gemm", "linear", "lora"))}
    ops |= {
        "quantize_per_token",
        "quantize_static",
        "quantize_heads",
        "adaln_quantize",
        "gelu_quantize",
        "w4_expand",
    }
    assert ops == backend.TRITON_OPS | backend.TORCH_OPS
    assert ops > backend.CPU_OPS
    assert all(callable(backend.load_kernel(op).launch) for op in backend.TRITON_OPS)


def test_a_missing_triton_is_named(monkeypatch):
    def refuse(name):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(backend.importlib, "import_module", refuse)
    with pytest.raises(RuntimeError, match=r"gemm_w8a8: CUDA tensors need Triton.*install triton"):
        backend.load_kernel("gemm_w8a8")

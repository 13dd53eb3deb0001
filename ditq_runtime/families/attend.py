"""The attention of a fused block, from the codes that its projections read to the residual stream behind it.

Two steps depend on what is static:

* Q, K and V of one input, where the attention has int8 values and static scales: their codes come from one GEMM.
* The input of `to_out`, behind a quantized attention: the attention leaves its codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import ditq_kernels as k
from ditq_runtime.attention.processor import key_mask_of
from ditq_runtime.families.fused import (
    FLOAT_ATTENTION,
    Step,
    packed_linear,
    product_steps,
    quantizer_step,
)
from ditq_runtime.families.fusible import is_hooked
from ditq_runtime.format.attention import CORE
from ditq_runtime.layers import check_nan
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.site import Codes

QKV = ("to_q", "to_k", "to_v")


def has_one_gemm(attn: nn.Module) -> bool:
    """Whether Q, K and V of one input come from one GEMM: static scales, layers of one format, no low-rank branch."""
    core = _own_core(attn)
    if core is None or not core.format.all_static or check_nan.ON:
        return False
    first, *others = (packed_linear(attn, name).format for name in QKV)
    return not first.lora_rank and all(other == first for other in others)


def attend_to_itself(attn: Any, codes: Codes, shape: torch.Size) -> torch.Tensor:
    """The attention [B, T, H, D] among the tokens of an input [B, T, K], given as the codes of its rows."""
    if has_one_gemm(attn):
        heads = _codes_of_heads(attn, codes, shape[0])
        out = _static_output(attn) or {"out_dtype": attn.to_q.compute_dtype}
        attended: torch.Tensor = getattr(attn, CORE).of_codes(*heads, **out)
        return attended
    query, key, value = (project(attn, getattr(attn, name), codes, shape) for name in QKV)
    return attend(attn, query, key, value, None)


def project(attn: Any, linear: QuantLinear, codes: Codes, shape: torch.Size) -> torch.Tensor:
    """The heads [B, T, H, D] that a projection makes of the codes of [B, T, K]."""
    width = linear.out_features // attn.heads  # not -1: there may be no tokens
    return linear.multiply(codes, linear.compute_dtype).view(*shape[:2], attn.heads, width)


def attend(
    attn: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """What the attention's processor does between the projections, or the codes `to_out` reads; all [B, T, H, D]."""
    batch, keys, heads, _ = key.shape
    core = getattr(attn, CORE, None)
    if core is not None:
        key_mask = key_mask_of(mask, batch, keys)
        return core(query, key, value, key_mask, **_static_output(attn))
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, keys, batch).view(batch, heads, -1, keys)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def add_output(
    attn: Any,
    rows: torch.Tensor,
    gate: torch.Tensor | None,
    context: torch.Tensor,
    name: str = "to_out.0",
) -> torch.Tensor:
    """The stream [B * T, D] + gate * to_out(context [B, T, H, D], or its codes), to_out by its name."""
    to_out: Any = packed_linear(attn, name)
    context = context.reshape(-1, to_out.in_features)
    is_coded = context.dtype == torch.int8
    codes = to_out.site.codes_left(context) if is_coded else to_out.quantize(context)
    added: torch.Tensor = to_out.add_to(rows, gate, codes)
    return added


def steps_of_one_input(block: nn.Module, name: str) -> list[Step]:
    """The ops of `attend_to_itself` and `add_output`, in order."""
    projections = tuple(f"{name}.{linear}" for linear in QKV)
    if has_one_gemm(block.get_submodule(name)):
        product: Any = getattr(block.get_submodule(name), CORE).format.ops[-1]
        return [("gemm_qkv_quantize", projections), (product, name), *_output_steps(block, name)]
    found = [step for linear in projections for step in product_steps(block, linear)]
    return found + steps_behind_projections(block, name)


def steps_behind_projections(block: nn.Module, name: str) -> list[Step]:
    """The ops of `attend` and `add_output`, in order."""
    core: Any = getattr(block.get_submodule(name), CORE, None)
    ops = (FLOAT_ATTENTION,) if core is None else core.format.ops
    return [*((op, name) for op in ops), *_output_steps(block, name)]


def _output_steps(block: nn.Module, name: str) -> list[Step]:
    to_out = f"{name}.to_out.0"
    coded = _static_output(block.get_submodule(name))
    quantizer = [] if coded else quantizer_step(block, to_out)
    return quantizer + product_steps(block, to_out, "gemm_residual")


def _static_output(attn: nn.Module) -> dict[str, Any]:
    """Arguments for a quantized attention to leave the codes that `to_out` reads; none where a scale per token does."""
    to_out = packed_linear(attn, "to_out.0")
    coded = _own_core(attn) is not None and to_out.site is not None and to_out.site.leaves_codes
    return to_out.site.output() if coded and to_out.site is not None else {}


def _own_core(attn: nn.Module) -> Any:
    """What attends in integers; None where nothing does, or where somebody wants to see it called as ever."""
    core = attn._modules.get(CORE)
    return None if core is None or is_hooked(core) else core


def _codes_of_heads(attn: Any, codes: Codes, batch: int) -> Any:
    """The codes of Q, K and V, int8 [B, H, T, D] each."""
    linears, core = [packed_linear(attn, name) for name in QKV], getattr(attn, CORE)
    options: dict[str, Any] = linears[0].epilogue(codes)
    if options.pop("weight_sum", None) is not None:
        options["weight_sums"] = tuple(linear._parameters["weight_sum"] for linear in linears)
    has_bias = linears[0].format.bias
    biases: Any = tuple(one._parameters["bias"] for one in linears) if has_bias else None
    query, key, value = (linear.packed() for linear in linears)
    return k.gemm_qkv_quantize(
        codes.q,
        (query, key, value),
        codes.scale,
        biases,
        batch=batch,
        heads=attn.heads,
        head_scales=tuple(core._parameters[name] for name in ("q_scale", "k_scale", "v_scale")),
        **options,
    )

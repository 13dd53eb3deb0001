"""A DiT block in fused kernels: what stands between two integer products happens inside of them.

    stock                                             fused
    layer norm, modulate, quantize for each of q k v  adaln_quantize, once
    to_q, to_k, to_v                                  three GEMMs
    attention                                         the same
    quantize, to_out, gate, add                       quantize, gemm_residual
    layer norm, modulate, quantize, fc1               adaln_quantize, GEMM
    GELU, quantize                                    in that GEMM (static), or gelu_quantize (token)
    fc2, gate, add                                    gemm_residual

On the reference the results in fp32 are those of the stock path to the bit. In half precision the fused path rounds
less: the results of `to_out` and `fc2` and the GELU stay fp32 until the next sum or quantizer, where the stock path
rounds each to half precision, and so does that of `fc1` where the activations of `fc2` are static.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import ditq_kernels as k
from ditq_runtime.attention_processor import CORE
from ditq_runtime.families.adaln import Modulation
from ditq_runtime.families.dit_fusible import LINEARS
from ditq_runtime.linear import Codes, QuantLinear


def forward(block: Any, hidden: torch.Tensor, m: Modulation) -> torch.Tensor:
    """One DiT block for which `dit_fusible.why_not` says nothing.

    Args:
        block: DiT's `BasicTransformerBlock`, packed.
        hidden: [B, T, D] fp32 | fp16 | bf16, the residual stream.
        m: its modulation, each [B, D] fp32, the scales as multipliers.

    Returns:
        [B, T, D] in the dtype of `hidden`.
    """
    attn, fc1, fc2 = block.attn1, block.ff.net[0].proj, block.ff.net[2]
    rows = hidden.contiguous().view(-1, hidden.shape[-1])  # the first block's is transposed

    codes = _adaln_codes(attn.to_q, rows, block.norm1.norm, m.scale_msa, m.shift_msa)
    query, key, value = (
        linear.multiply(codes, linear.compute_dtype).view(*hidden.shape[:2], attn.heads, -1)
        for linear in (attn.to_q, attn.to_k, attn.to_v)
    )
    context = _attend(attn, query, key, value).reshape(len(rows), -1)
    to_out = attn.to_out[0]
    rows = to_out.add_to(rows, m.gate_msa, to_out.quantize(context))

    codes = _adaln_codes(fc1, rows, block.norm3, m.scale_mlp, m.shift_mlp)
    rows = fc2.add_to(rows, m.gate_mlp, fc1.gelu_codes(fc2, codes))
    return rows.view(hidden.shape)


Step = tuple[str, str]  # an op of `ditq::`, and the linear inside the block that it belongs to


def steps(block: Any) -> tuple[list[Step], list[Step]]:
    """The ops of the forward above, in order: before the attention, and after it."""
    linears = {name: block.get_submodule(name) for name in LINEARS}
    *projections, to_out, fc1, fc2 = linears
    before = [("adaln_quantize", projections[0])]
    for name in projections:
        before += _product(linears, name)
    after = [(linears[to_out].format.ops[0], to_out)]
    after += _product(linears, to_out, "gemm_residual")
    after.append(("adaln_quantize", fc1))
    if linears[fc2].format.activations == "static":
        after += _product(linears, fc1, "gemm_gelu_quantize")
    else:
        after += [*_product(linears, fc1), ("gelu_quantize", fc2)]
    return before, after + _product(linears, fc2, "gemm_residual")


def _product(linears: dict[str, Any], name: str, fused: str = "") -> list[Step]:
    """What a linear runs behind its quantizer, its GEMM replaced by a fused one."""
    *low_rank, gemm = linears[name].format.ops[1:]
    return [(op, name) for op in (*low_rank, fused or gemm)]


def _adaln_codes(
    consumer: QuantLinear,
    rows: torch.Tensor,
    norm: nn.LayerNorm,
    multiplier: torch.Tensor,
    shift: torch.Tensor,
) -> Codes:
    """The quantized input of `consumer`, which reads LN(rows) * multiplier + shift."""
    static: dict[str, Any] = {}
    if consumer.format.activations == "static":
        static = {"scale": consumer.act_scale.data, "zero_point": consumer.act_zero}
    smooth_inv = consumer.smooth_inv if consumer.format.smooth else None
    q, scale, _ = k.adaln_quantize(rows, multiplier, shift, smooth_inv, eps=norm.eps, **static)
    return Codes(q, scale)


def _attend(attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What the block's processor does between the projections; all [B, T, H, D]."""
    core = getattr(attn, CORE, None)
    if core is not None:
        return core(query, key, value, None)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)

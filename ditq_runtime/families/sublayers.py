"""The sublayers of fused blocks: what stands between two integer products happens inside of them.

    stock                                             fused
    layer norm, modulate, quantize for each of q k v  adaln_quantize, once
    to_q, to_k, to_v, quantize each, attention        three GEMMs and the same; see `attend` where those are static
    quantize, to_out, gate, add                       quantize, gemm_residual
    cross-attention: quantize for each of q k v       quantize the stream, and the caption once
    to_q, to_k, to_v, attention                       the same
    quantize, to_out, add                             quantize, gemm_residual without a gate
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
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from ditq_runtime.attention.install import PLAIN, not_plain
from ditq_runtime.attention.processor import QuantAttnProcessor
from ditq_runtime.families.attend import (
    QKV,
    add_output,
    attend,
    attend_to_itself,
    project,
    steps_behind_projections,
    steps_of_one_input,
)
from ditq_runtime.families.fused import (
    Call,
    Step,
    as_rows,
    packed_linear,
    part_of,
    product_steps,
    quantizer_step,
)
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.site import Codes

ATTENTION = {
    "": Attention,
    **dict.fromkeys((f".{name}" for name in (*QKV, "to_out.0")), QuantLinear),
    ".to_out.1": nn.Dropout,
}
FEED_FORWARD = {
    "": FeedForward,
    ".net.0": GELU,
    ".net.0.proj": QuantLinear,
    ".net.1": nn.Dropout,
    ".net.2": QuantLinear,
}
PROCESSORS: tuple[type, type] = (AttnProcessor2_0, QuantAttnProcessor)
NO_NORMS = {**PLAIN, "norm_q": None, "norm_k": None}


class SelfAttention:
    """AdaLN, attention among the tokens of an image, gate, sum; see `fused.Sublayer`."""

    def __init__(self, attn: str, norm: str) -> None:
        """Name the attention and the norm before it."""
        self.attn, self.norm = attn, norm
        self.parts: dict[str, type] = {norm: nn.LayerNorm, **under(attn, ATTENTION)}
        self.processors = {attn: PROCESSORS}

    def obstacle(self, block: nn.Module) -> str:
        """Norms with weights, settings of the attention, three ways to quantize one input."""
        return (
            affine(block, self.norm)
            or not_plain(block.get_submodule(self.attn), NO_NORMS, "a fused block")
            or unshared(block, self.attn, QKV)
        )

    def forward(self, block: nn.Module, rows: torch.Tensor, call: Call) -> torch.Tensor:
        """The stream + gate_msa * to_out(attention(AdaLN(stream)))."""
        attn, norm, m = part_of(block, self.attn), part_of(block, self.norm), call.m
        codes = adaln_codes(packed_linear(attn, "to_q"), rows, norm, m.scale_msa, m.shift_msa)
        return add_output(attn, rows, m.gate_msa, attend_to_itself(attn, codes, call.shape))

    def steps(self, block: nn.Module) -> list[Step]:
        """The ops of that forward, in order."""
        return [("adaln_quantize", f"{self.attn}.to_q"), *steps_of_one_input(block, self.attn)]


class CrossAttention:
    """Attention of the residual stream itself to the caption, sum; see `fused.Sublayer`."""

    def __init__(self, attn: str) -> None:
        """Name the attention."""
        self.attn = attn
        self.parts = under(attn, ATTENTION)
        self.processors = {attn: PROCESSORS}

    def obstacle(self, block: nn.Module) -> str:
        """Settings of the attention, two ways to quantize the caption."""
        attn = block.get_submodule(self.attn)
        return not_plain(attn, NO_NORMS, "a fused block") or unshared(block, self.attn, QKV[1:])

    def forward(self, block: nn.Module, rows: torch.Tensor, call: Call) -> torch.Tensor:
        """The stream + to_out(attention(stream, caption)); no norm, no gate."""
        attn, caption = part_of(block, self.attn), call.caption
        assert caption is not None
        query = project(attn, attn.to_q, attn.to_q.quantize(rows), call.shape)
        codes = attn.to_k.quantize(as_rows(caption))
        key, value = (
            project(attn, linear, codes, caption.shape) for linear in (attn.to_k, attn.to_v)
        )
        context = attend(attn, query, key, value, call.caption_mask)
        return add_output(attn, rows, None, context)

    def steps(self, block: nn.Module) -> list[Step]:
        """The ops of that forward, in order."""
        to_q, to_k, to_v = (f"{self.attn}.{name}" for name in QKV)
        found = [*quantizer_step(block, to_q), *product_steps(block, to_q)]
        found += [
            *quantizer_step(block, to_k),
            *product_steps(block, to_k),
            *product_steps(block, to_v),
        ]
        return found + steps_behind_projections(block, self.attn)


class FeedForwardLayer:
    """AdaLN, two linears with GELU between them, gate, sum; see `fused.Sublayer`."""

    def __init__(self, ff: str, norm: str) -> None:
        """Name the feed-forward and the norm before it."""
        self.ff, self.norm = ff, norm
        self.parts: dict[str, type] = {norm: nn.LayerNorm, **under(ff, FEED_FORWARD)}
        self.processors: dict[str, tuple[type, type]] = {}

    def obstacle(self, block: nn.Module) -> str:
        """Norms with weights, another GELU, more layers."""
        ff: Any = block.get_submodule(self.ff)
        if ff.net[0].approximate != "tanh" or len(ff.net) != 3:
            return "its feed-forward is not fc1, GELU in the tanh form, fc2"
        return affine(block, self.norm)

    def forward(self, block: nn.Module, rows: torch.Tensor, call: Call) -> torch.Tensor:
        """The stream + gate_mlp * fc2(GELU(fc1(AdaLN(stream))))."""
        ff, norm, m = part_of(block, self.ff), part_of(block, self.norm), call.m
        fc1, fc2 = packed_linear(ff, "net.0.proj"), packed_linear(ff, "net.2")
        codes = adaln_codes(fc1, rows, norm, m.scale_mlp, m.shift_mlp)
        added: torch.Tensor = fc2.add_to(rows, m.gate_mlp, fc1.gelu_codes(fc2, codes))
        return added

    def steps(self, block: nn.Module) -> list[Step]:
        """The ops of that forward, in order."""
        fc1, fc2 = f"{self.ff}.net.0.proj", f"{self.ff}.net.2"
        found: list[Step] = [("adaln_quantize", fc1)]
        site = packed_linear(block, fc2).site
        if site is not None and site.leaves_codes:
            found += product_steps(block, fc1, "gemm_gelu_quantize")
        else:
            found += [*product_steps(block, fc1), ("gelu_quantize", fc2)]
        return found + product_steps(block, fc2, "gemm_residual")


def under(prefix: str, parts: dict[str, type]) -> dict[str, type]:
    """Parts of a module, named from the block."""
    return {f"{prefix}{name}": kind for name, kind in parts.items()}


def affine(block: nn.Module, name: str) -> str:
    """Why a layer norm is none without weights; empty if it is."""
    norm: Any = block.get_submodule(name)
    return "" if norm.weight is None and norm.bias is None else f"its {name} has weights of its own"


def unshared(block: nn.Module, attn: str, names: tuple[str, ...]) -> str:
    """Why linears of an attention cannot read one quantized input; empty if they can."""
    first, *others = (packed_linear(block, f"{attn}.{name}").site for name in names)
    if all(site is first for site in others):
        return ""
    return (
        f"{', '.join(names[:-1])} and {names[-1]} of {attn} quantize their input in different ways"
    )


def adaln_codes(
    consumer: QuantLinear,
    rows: torch.Tensor,
    norm: Any,
    multiplier: torch.Tensor,
    shift: torch.Tensor,
) -> Codes:
    """The quantized input of `consumer`, which reads LN(rows) * multiplier + shift."""
    assert consumer.site is not None
    return consumer.site.of_adaln(rows, multiplier, shift, norm.eps)

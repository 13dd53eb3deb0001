"""Fused blocks whose attention and MLP read one input, and whose output projection reads both: Flux's single blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import nn

from ditq_runtime.families.fused import (
    Step,
    as_rows,
    packed_linear,
    part_of,
    product_steps,
    quantizer_step,
)
from ditq_runtime.families.projections import products
from ditq_runtime.families.streams import Adaln, StreamsAttention, image_stream
from ditq_runtime.layers.linear import QuantLinear


class ParallelLayer:
    """AdaLN, attention beside an MLP, one projection of both, gate, sum; see `fused.Sublayer`."""

    def __init__(self, fc1: str, activation: str, output: str) -> None:
        """Name the parts of the block; the activation is called."""
        self._fc1, self._activation, self._output = fc1, activation, output
        stream = image_stream("norm.norm", output="")
        self._attention = StreamsAttention("attn", FluxAttention, FluxAttnProcessor, stream)
        self.parts: dict[str, type] = {
            **self._attention.parts,
            fc1: QuantLinear,
            output: QuantLinear,
        }
        self.processors = self._attention.processors

    def obstacle(self, block: nn.Module) -> str:
        """Those of the attention, and an MLP that quantizes its input in another way."""
        reason = self._attention.obstacle(block)
        if reason:
            return reason
        sites = [packed_linear(block, name).site for name in ("attn.to_q", self._fc1)]
        if sites[0] is sites[1]:
            return ""
        return f"attn and {self._fc1} quantize their input in different ways"

    def forward(
        self, block: nn.Module, hidden: torch.Tensor, adaln: Adaln, rotation: Any
    ) -> torch.Tensor:
        """One block for which `fusible.why_not` says nothing.

        Args:
            block: a packed block of the family.
            hidden: [B, T, D] fp32 | fp16 | bf16, the tokens of both kinds.
            adaln: its shift, multiplier and gate.
            rotation: as the attention's processor takes it.

        Returns:
            [B, T, D] in the dtype of `hidden`.
        """
        rows, fc1 = as_rows(hidden), packed_linear(block, self._fc1)
        codes = self._attention.codes(block, 0, rows, adaln)
        *projected, mlp = products([*self._attention.linears(block, 0), fc1], codes)
        mlp = part_of(block, self._activation)(mlp)
        heads = self._attention.heads(block, projected, hidden.shape)
        context = self._attention.attend(block, [heads], rotation)
        output = packed_linear(block, self._output)
        both = torch.cat([context.flatten(0, 1), mlp], dim=1)
        return output.add_to(rows, adaln[2], output.quantize(both)).view(hidden.shape)

    def steps(self, block: nn.Module) -> list[Step]:
        """The ops of that forward, in order."""
        return [
            *self._attention.steps_before(block, self._fc1),
            *self._attention.steps_between(block),
            *quantizer_step(block, self._output),
            *product_steps(block, self._output, "gemm_residual"),
        ]

"""Fused blocks whose image and text tokens attend to each other: Flux's and SD3's.

Each stream is quantized once behind its AdaLN, for all linears that read it, which are one launch; gates and sums
happen in the GEMMs behind the attention. Norms of heads and rotation go into the quantizers of a quantized attention.
Results are those of the stock path as `sublayers` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from ditq_runtime.attention.dispatcher import values_asked_of
from ditq_runtime.attention.install import TAKES_PLACE_OF, not_plain
from ditq_runtime.attention.joint import TEXT, TEXT_NORMS, attend_streams
from ditq_runtime.attention.processor import IMAGE, NORMS, Names
from ditq_runtime.families.adaln import Modulation
from ditq_runtime.families.attend import add_output
from ditq_runtime.families.float_streams import attend_flux, attend_sd3
from ditq_runtime.families.fused import (
    FLOAT_ATTENTION,
    Call,
    Parts,
    Step,
    as_rows,
    packed_linear,
    part_of,
    product_steps,
    quantizer_step,
)
from ditq_runtime.families.projections import products, projection_steps
from ditq_runtime.families.sublayers import (
    FeedForwardLayer,
    adaln_codes,
    affine,
    under,
    unshared,
)
from ditq_runtime.format.attention import CORE, HEADS, AttentionFormat
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.site import Codes

Adaln = Sequence[torch.Tensor | None]  # shift, multiplier, gate of a sublayer, each [B, D]
Heads = list[torch.Tensor]  # Q, K, V of a stream, each [B, T, H, D]
FLOAT: dict[type, Callable[..., torch.Tensor]] = {
    FluxAttention: attend_flux,
    Attention: attend_sd3,
}


class Stream(NamedTuple):
    """Tokens of one kind in an attention.

    Attributes:
        norm: of the block, before it.
        projections: to Q, K and V.
        norms: of the heads of Q and K.
        output: linear behind it; empty: none.
    """

    norm: str
    projections: Names
    norms: Names
    output: str


def image_stream(norm: str = "norm1.norm", output: str = "to_out.0") -> Stream:
    """That of the image."""
    return Stream(norm, IMAGE, NORMS, output)


def text_stream(output: str = "to_add_out") -> Stream:
    """That of the text."""
    return Stream("norm1_context.norm", TEXT, TEXT_NORMS, output)


class StreamsAttention:
    """AdaLN of each stream, attention among all their tokens; see `fused.Sublayer`.

    Attributes:
        attn: its name.
        streams: in the order of their tokens.
    """

    def __init__(self, attn: str, kind: type, stock: type, *streams: Stream) -> None:
        """Name the attention, what it is, and the processor that diffusers gives it."""
        self.attn, self.streams = attn, streams
        quantized, self._plain = TAKES_PLACE_OF[stock]
        self.processors: dict[str, tuple[type, type]] = {attn: (stock, quantized)}
        linears = [name for one in streams for name in (*one.projections, one.output) if name]
        self._float = FLOAT[kind]
        self.parts: dict[str, type] = {one.norm: nn.LayerNorm for one in streams}
        self.parts |= under(attn, {"": kind, **{f".{name}": QuantLinear for name in linears}})
        if "to_out.0" in linears:
            self.parts[f"{attn}.to_out.1"] = nn.Dropout

    def obstacle(self, block: nn.Module) -> str:
        """Norms with weights, settings of the attention, several ways to quantize one input."""
        reasons = [not_plain(block.get_submodule(self.attn), self._plain, "a fused block")]
        for one in self.streams:
            reasons += [affine(block, one.norm), unshared(block, self.attn, one.projections)]
        return next((reason for reason in reasons if reason), "")

    def codes(self, block: nn.Module, index: int, rows: torch.Tensor, adaln: Adaln) -> Codes:
        """The quantized input [B * T, D] of the projections of a stream."""
        one, (shift, multiplier, *_) = self.streams[index], adaln
        assert shift is not None
        assert multiplier is not None
        reader = packed_linear(part_of(block, self.attn), one.projections[0])
        return adaln_codes(reader, rows, part_of(block, one.norm), multiplier, shift)

    def linears(self, block: nn.Module, index: int) -> list[QuantLinear]:
        """The projections of a stream."""
        attn = part_of(block, self.attn)
        return [packed_linear(attn, name) for name in self.streams[index].projections]

    def heads(
        self, block: nn.Module, projected: Sequence[torch.Tensor], shape: torch.Size
    ) -> Heads:
        """Q, K and V of a stream [B, T, D] as their projections made them, before any norm."""
        count = part_of(block, self.attn).heads  # and not -1 behind it: there may be no tokens
        return [one.view(*shape[:2], count, one.shape[1] // count) for one in projected]

    def attend(self, block: nn.Module, heads: Sequence[Heads], rotation: Any) -> torch.Tensor:
        """[B, T, H * D] of all streams."""
        attn = part_of(block, self.attn)
        streams = [(made, one.norms) for made, one in zip(heads, self.streams, strict=True)]
        if attn._modules.get(CORE) is None:
            return self._float(attn, streams, rotation)
        return attend_streams(attn, streams, rotation)

    def forward(
        self,
        block: nn.Module,
        read: Sequence[torch.Tensor],
        onto: Sequence[torch.Tensor],
        shapes: Sequence[torch.Size],
        adaln: Sequence[Adaln],
        rotation: Any = None,
    ) -> list[torch.Tensor]:
        """Streams `onto` + gate * output(attention(AdaLN(streams `read`))), [B * T, D]; without output as they are."""
        heads = []
        for i, rows in enumerate(read):
            codes = self.codes(block, i, rows, adaln[i])
            made = products(self.linears(block, i), codes)
            heads.append(self.heads(block, made, shapes[i]))
        context = self.attend(block, heads, rotation)
        parts = context.split([shape[1] for shape in shapes], dim=1)
        attn = part_of(block, self.attn)
        return [
            add_output(attn, rows, m[2], part, one.output) if one.output else rows
            for one, rows, m, part in zip(self.streams, onto, adaln, parts, strict=True)
        ]

    def steps(self, block: nn.Module) -> list[Step]:
        """The ops of that forward, in order."""
        found = [*self.steps_before(block), *self.steps_between(block)]
        for one in self.streams:
            if one.output:
                name = f"{self.attn}.{one.output}"
                found += [
                    *quantizer_step(block, name),
                    *product_steps(block, name, "gemm_residual"),
                ]
        return found

    def steps_before(self, block: nn.Module, *beside: str) -> list[Step]:
        """Those of quantizers and projections, and of other linears that read the same input."""
        found: list[Step] = []
        for one in self.streams:
            names = [f"{self.attn}.{name}" for name in one.projections]
            found.append(("adaln_quantize", names[0]))
            found += projection_steps(block, [*names, *beside])
        return found

    def steps_between(self, block: nn.Module) -> list[Step]:
        """Those of the attention itself; Q and K of each stream are quantized apart."""
        attn = part_of(block, self.attn)
        core: Any = attn._modules.get(CORE)
        if core is None:
            values = values_asked_of(attn.processor)
            ops = AttentionFormat(values, "token").ops if values else (FLOAT_ATTENTION,)
            return [(op, self.attn) for op in ops]
        *quantizers, product = core.format.ops
        count = len(quantizers) + 2 * (len(self.streams) - 1)
        return [*[(HEADS, self.attn)] * count, (product, self.attn)]


class StreamsLayout(Parts):
    """A block with a residual stream for each kind of tokens.

    Attributes:
        attention: of all streams.
        second: of the image alone, or None.
        feed_forwards: of each stream in the order of the attention; None where it ends.
    """

    def __init__(
        self,
        modulations: dict[str, type],
        attention: StreamsAttention,
        feed_forwards: Sequence[FeedForwardLayer | None],
        second: StreamsAttention | None = None,
    ) -> None:
        """Collect the parts."""
        self.attention, self.second, self.feed_forwards = attention, second, feed_forwards
        found = (attention, second, *feed_forwards)
        super().__init__(modulations, *(part for part in found if part is not None))

    def forward(
        self,
        block: nn.Module,
        hidden: Sequence[torch.Tensor],
        modulations: Sequence[Adaln],
        rotation: Any = None,
        second: Adaln = (),
    ) -> list[torch.Tensor]:
        """One block for which `fusible.why_not` says nothing.

        Args:
            block: a packed block of the family.
            hidden: [B, T, D] of each stream, fp32 | fp16 | bf16.
            modulations: of each stream, `Modulation` or, where it ends, its shift, multiplier and None.
            rotation: as the attention's processor takes it.
            second: shift, multiplier and gate of the second attention, whose stream is the first.

        Returns:
            The streams, each in its dtype.
        """
        shapes, rows = [one.shape for one in hidden], [as_rows(one) for one in hidden]
        made = self.attention.forward(block, rows, rows, shapes, modulations, rotation)
        if self.second is not None:
            made[:1] = self.second.forward(block, rows[:1], made[:1], shapes[:1], [second])
        for i, feed_forward in enumerate(self.feed_forwards):
            if feed_forward is not None:
                m: Any = modulations[i]
                made[i] = feed_forward.forward(block, made[i], Call(shapes[i], Modulation(*m)))
        return [one.view(shape) for one, shape in zip(made, shapes, strict=True)]

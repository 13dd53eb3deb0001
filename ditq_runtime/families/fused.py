"""What a fused block is made of: a family's layout lists the sublayers of its block and runs them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ditq_runtime.families.adaln import Modulation
from ditq_runtime.layers.linear import QuantLinear

# an op of `ditq::`, and the linear, linears or attention inside the block that it belongs to
Step = tuple[str, str | tuple[str, ...]]
FLOAT_ATTENTION = "attention"  # in place of an op: whatever torch runs for one


class Call(NamedTuple):
    """What the sublayers of one forward share.

    Attributes:
        shape: [B, T, D] of the residual stream.
        m: the block's modulation, each [B, D] fp32, the scales as multipliers.
        caption: [B, Tk, C] what cross-attention attends to, or None in a block without one.
        caption_mask: [B, Tk] or [B, 1, Tk] as `Attention` takes it, or None.
    """

    shape: torch.Size
    m: Modulation
    caption: torch.Tensor | None = None
    caption_mask: torch.Tensor | None = None


class Sublayer(Protocol):
    """One residual step of a block.

    Attributes:
        parts: the modules of the block that it does not call: name -> what each must be.
        processors: name of an attention among them -> what it must be called with, float or quantized.
    """

    parts: dict[str, type]
    processors: dict[str, tuple[type, type]]

    def obstacle(self, block: nn.Module) -> str:
        """What settings and values of a block whose parts are in place say against fusing it; empty: nothing."""

    def steps(self, block: nn.Module) -> list[Step]:
        """The ops of that forward, in order."""


class StreamSublayer(Sublayer, Protocol):
    """One of a block with one residual stream."""

    def forward(self, block: nn.Module, rows: torch.Tensor, call: Call) -> torch.Tensor:
        """The residual stream [B * T, D] behind this sublayer, in the dtype of `rows`."""


class Parts:
    """What a fused block is made of, whatever its forward.

    Attributes:
        modulations: names of the modules that emit it, in fp32, and what each must be; a fused block calls them.
        sublayers: in the order they run.
        parts: the modules that a fused block does not call: name -> what each must be.
        paths: the same, taken apart: name, its steps, kind.
        linears: names of the packed ones among them.
        attentions: names of the attentions among them, and the processors they may have.
    """

    def __init__(self, modulations: dict[str, type], *sublayers: Sublayer) -> None:
        """Collect the parts."""
        self.modulations = modulations
        self.sublayers: tuple[Any, ...] = sublayers
        self.parts = {name: kind for part in sublayers for name, kind in part.parts.items()}
        self.paths = [(name, name.split("."), kind) for name, kind in self.parts.items()]
        self.linears = tuple(n for n, kind in self.parts.items() if kind is QuantLinear)
        self.attentions = {
            name: allowed for part in sublayers for name, allowed in part.processors.items()
        }

    def steps(self, block: nn.Module) -> list[Step]:
        """The ops of its forward, in order."""
        return [step for sublayer in self.sublayers for step in sublayer.steps(block)]


class Layout(Parts):
    """The sublayers of a block with one residual stream, each a `StreamSublayer`."""

    def forward(
        self, block: nn.Module, hidden: torch.Tensor, m: Modulation, *caption: torch.Tensor | None
    ) -> torch.Tensor:
        """One block for which `fusible.why_not` says nothing.

        Args:
            block: a packed block of the family.
            hidden: [B, T, D] fp32 | fp16 | bf16, the residual stream.
            m: its modulation, each [B, D] fp32, the scales as multipliers.
            caption: what cross-attention attends to and its mask, as in `Call`.

        Returns:
            [B, T, D] in the dtype of `hidden`.
        """
        call = Call(hidden.shape, m, *caption)
        rows = as_rows(hidden)
        for sublayer in self.sublayers:
            rows = sublayer.forward(block, rows, call)
        return rows.view(hidden.shape)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[B, T, D] as [B * T, D], contiguous: patch embeddings are transposed."""
    return x.contiguous().view(-1, x.shape[-1])


def packed_linear(module: nn.Module, name: str) -> QuantLinear:
    """A linear inside of a block or attention."""
    linear = part_of(module, name)
    assert isinstance(linear, QuantLinear)
    return linear


def part_of(module: nn.Module, name: str) -> Any:
    """A module inside of another by its dotted name; as `get_submodule`, without looking for attributes in Python."""
    found: Any = module
    for step in name.split("."):
        found = found._modules[step]
    return found


def quantizer_step(block: nn.Module, name: str) -> list[Step]:
    """What quantizes the input of a linear by itself."""
    return [(packed_linear(block, name).format.ops[0], name)]


def product_steps(block: nn.Module, name: str, fused: str = "") -> list[Step]:
    """What a linear runs behind its quantizer, its GEMM replaced by a fused one."""
    *low_rank, gemm = packed_linear(block, name).format.ops[1:]
    return [(op, name) for op in (*low_rank, fused or gemm)]

"""The vocabulary of a family table: which producer feeds which linears, and what a fold may do there.

A site is one input shared by the linears that read it. Its smoothing factor s (activations / s, weight columns * s)
is folded into the producer where that is exact (METHODS: SmoothQuant Eq. 3; PTQ4DiT Eq. 12; HTG Eq. 8).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

TIMESTEP_GROUPS = "timestep_groups"  # name of the module in a block that finds its current group


def get_linear(module: nn.Module, name: str) -> nn.Linear:
    """The linear called `name`; ValueError if the module has none of that name."""
    found = dict(module.named_modules()).get(name)
    if not isinstance(found, nn.Linear):
        raise ValueError(
            f"{type(module).__name__} has no linear {name}, which its family table lists"
        )
    return found


@dataclass(frozen=True)
class AdaLN:
    """Fold kind K1: X = LN(h) * (1 + scale) + shift, both rows of a modulation linear of this block.

    Attributes:
        modulation: name of the modulation linear inside the block, rows in chunks of width K.
        shift_chunk: which chunk of its rows is the shift.
        scale_chunk: which chunk of its rows is the scale.
    """

    modulation: str
    shift_chunk: int
    scale_chunk: int


@dataclass(frozen=True)
class ValueRows:
    """Fold kind V: X = P V with softmax rows that sum to one, so a channel of V is a channel of X.

    Attributes:
        value: name of the value projection inside the block.
    """

    value: str


@dataclass(frozen=True)
class OnTheFly:
    """No producer can absorb a factor exactly; the quantizer multiplies by it.

    Attributes:
        reason: why, in words for `ditq inspect`.
    """

    reason: str


Producer = AdaLN | ValueRows | OnTheFly


@dataclass(frozen=True)
class Site:
    """One linear input of a block.

    Attributes:
        name: short name, unique in the block.
        consumers: linears inside the block that read it; they share one smoothing factor.
        producer: what makes it, and so how a factor folds.
    """

    name: str
    consumers: tuple[str, ...]
    producer: Producer


@dataclass(frozen=True)
class Family:
    """Everything the converter and the runtime must know about one diffusers transformer class.

    Attributes:
        architecture: diffusers class name.
        blocks: attribute that holds the repeated blocks.
        sites: the sites of every block.
        modulations: modulation linears of a block and their number of row chunks; weight-only.
        kept: linears outside the blocks that stay float, with the reason.
        shared_embedder: prefix, inside a block, of an embedder that may be equal in all blocks; None if none.
        use_direct_multiplier: swaps a block's class so that AdaLN reads LN(h) * a + b from its modulation.
        example_inputs: a smallest batch for one forward: keyword arguments.
    """

    architecture: str
    blocks: str
    sites: tuple[Site, ...]
    modulations: dict[str, int]
    kept: dict[str, str]
    shared_embedder: str | None
    use_direct_multiplier: Callable[[nn.Module], None]
    example_inputs: Callable[[nn.Module], dict[str, Any]]

    def block_names(self, model: nn.Module) -> list[str]:
        """`blocks.0`, `blocks.1`, ... of a model."""
        return [
            f"{self.blocks}.{name}" for name, _ in model.get_submodule(self.blocks).named_children()
        ]

    def embedder_prefixes(self, model: nn.Module) -> list[str]:
        """Prefix of the embedder in every block, the first one being the stored one when it is shared."""
        if self.shared_embedder is None:
            return []
        return [f"{name}.{self.shared_embedder}" for name in self.block_names(model)]

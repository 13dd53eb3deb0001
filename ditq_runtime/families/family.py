"""What the converter and the runtime must know about one diffusers transformer class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ditq_runtime.attention.install import recognised
from ditq_runtime.families.sites import AdaLN, NormWeights, Site


@dataclass(frozen=True)
class BlockTable:
    """One kind of block.

    Attributes:
        sites: linear inputs, in the order they are met.
        modulations: modulation linears of the block and their number of row chunks; weight-only.
        tables: parameters that the block adds to a modulation shared by all blocks, and their number of row chunks.
        use_direct_multiplier: swaps a block's class so that AdaLN reads LN(h) * a + b from its modulation; None: the
            block keeps diffusers' forward, and no site of it may be an AdaLN.
        attentions: attention modules of the block that can run quantized (see `attention_install`), in the order they
            run.
    """

    sites: tuple[Site, ...]
    modulations: dict[str, int] = field(default_factory=dict)
    tables: dict[str, int] = field(default_factory=dict)
    use_direct_multiplier: Callable[[nn.Module], None] | None = None
    attentions: tuple[str, ...] = ()

    @property
    def norms(self) -> list[str]:
        """Norms that absorb transforms."""
        return [s.producer.norm for s in self.sites if isinstance(s.producer, NormWeights)]

    @property
    def linears(self) -> list[str]:
        """Every linear that a scheme can list: consumers, then modulations."""
        return [name for site in self.sites for name in site.consumers] + list(self.modulations)

    def scale_rows(self, modulation: str, num_rows: int) -> list[slice]:
        """Rows of a modulation linear or table that emit a scale; a direct multiplier is that plus one."""
        width = num_rows // self.chunks(modulation)
        chunks = {
            site.producer.scale_chunk
            for site in self.sites
            if isinstance(site.producer, AdaLN) and site.producer.modulation == modulation
        }
        return [slice(i * width, (i + 1) * width) for i in sorted(chunks)]

    def chunks(self, modulation: str) -> int:
        """Row chunks of a modulation linear or of a table."""
        return {**self.modulations, **self.tables}[modulation]


@dataclass(frozen=True)
class Hoistable:
    """How modulation is computed for many steps at once; it depends on the timestep and on what stays for a run.

    Attributes:
        conditions: keyword arguments of the model's forward -> what modulation depends on beside the timestep, each
            with one row a sample; None: it is not there, or not so.
        holders: model -> the modules that look for a hoisted value (`adaln.hoisted`).
        compute: model, timesteps [S * B], conditions with as many rows, and dtype of the hidden states -> the value
            [S * B, N] of each holder.
        argument: timesteps of the schedule, in the dtype of the model's argument -> that argument, as the pipeline
            makes it.
    """

    conditions: Callable[[dict[str, Any]], tuple[torch.Tensor, ...] | None]
    holders: Callable[[Any], list[nn.Module]]
    compute: Callable[
        [Any, torch.Tensor, tuple[torch.Tensor, ...], torch.dtype], list[torch.Tensor]
    ]
    argument: Callable[[torch.Tensor], torch.Tensor] = lambda timesteps: timesteps


@dataclass(frozen=True)
class Family:
    """One diffusers transformer class.

    Attributes:
        architecture: diffusers class name.
        block_tables: the blocks of a model, in the order they run: name -> table.
        kept: names, or parts of names, of linears that stay float, with the reason.
        example_inputs: a smallest batch for one forward, as keyword arguments; None: the caller must bring one.
        shared_embedder: prefix, inside a block, of an embedder that may be equal in all blocks; None if none.
        timestep_scale: the model's `timestep` argument is this times the scheduler's timestep.
        hoistable: how its modulation can be computed before the sampling loop; None: it cannot.
        timestep_argument: name of the argument of the model's forward that carries the timestep; None: none or several.
        why_no_timestep: why there is none, for who needs it.
        final_modulation: the linear outside the blocks that modulates the last norm; weight-only, in 8 bits whatever
            the others have: no block comes after it to drown its error. None if there is none.
    """

    architecture: str
    block_tables: Callable[[nn.Module], dict[str, BlockTable]]
    kept: dict[str, str]
    example_inputs: Callable[[nn.Module], dict[str, Any]] | None = None
    shared_embedder: str | None = None
    timestep_scale: float = 1.0
    timestep_argument: str | None = "timestep"
    why_no_timestep: str = ""
    hoistable: Hoistable | None = None
    final_modulation: str | None = None

    def block_names(self, model: nn.Module) -> list[str]:
        """`blocks.0`, `blocks.1`, ... of a model."""
        return list(self.block_tables(model))

    def part_names(self, model: nn.Module) -> list[str]:
        """What converts by itself: the blocks, then the final modulation."""
        last = [] if self.final_modulation is None else [self.final_modulation]
        return [*self.block_names(model), *last]

    def modulation_names(self, model: nn.Module) -> list[str]:
        """The modulation linears: those of the blocks, then the final one."""
        tables = self.block_tables(model).items()
        inside = [f"{block}.{name}" for block, table in tables for name in table.modulations]
        return inside if self.final_modulation is None else [*inside, self.final_modulation]

    def attention_names(self, model: nn.Module) -> list[str]:
        """The attention modules of a model that can run quantized, in the order they run.

        Where no table lists them: those whose stock processor is one that quantized attention can stand in for.
        """
        return [
            f"{block}.{name}"
            for block, table in self.block_tables(model).items()
            for name in (
                table.attentions
                if table.use_direct_multiplier is not None
                else recognised(model.get_submodule(block))
            )
        ]

    def embedder_prefixes(self, model: nn.Module) -> list[str]:
        """Prefix of the embedder in every block, the first one being the stored one when it is shared."""
        if self.shared_embedder is None:
            return []
        return [f"{name}.{self.shared_embedder}" for name in self.block_names(model)]

    def why_kept(self, name: str) -> str:
        """Why a linear that no block table lists stays float."""
        if name in self.kept:
            return self.kept[name]
        found = (reason for part, reason in self.kept.items() if part in name)
        return next(found, "not in the family table, kept float")


def blocks_in(
    **lists: Callable[[nn.Module], BlockTable],
) -> Callable[[nn.Module], dict[str, BlockTable]]:
    """`Family.block_tables` of a model whose blocks stand in lists: attribute -> table of one of its blocks."""

    def block_tables(model: nn.Module) -> dict[str, BlockTable]:
        return {
            f"{attribute}.{name}": table_of(block)
            for attribute, table_of in lists.items()
            for name, block in model.get_submodule(attribute).named_children()
        }

    return block_tables

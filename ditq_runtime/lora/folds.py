"""What was folded away, kept: with it a low-rank adapter of the float model can be folded the same way.

A folded site reads (X - z_g) / s in place of X. Playback needs neither s nor z; only `lora.adapter` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ditq_runtime.errors import CheckpointError
from ditq_runtime.families import AdaLN, BlockTable, Site, ValueRows, get_linear
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.pinned import Pinned

FOLDS = "folds"  # name of the module in a block that holds them


class Fold(Pinned):
    """The fold of one site.

    Attributes:
        scale: fp32 [K], the factor s; 1 on channels beyond those of V, which a site may have.
        shift: fp32 [S, K], the shift z: one for all timesteps (S = 1) or one per timestep group; None: no shift.
    """

    scale: nn.Parameter
    shift: nn.Parameter | None

    def __init__(
        self, in_features: int, num_shifts: int, device: torch.device | str = "meta"
    ) -> None:
        """Allocate, uninitialized."""
        super().__init__()
        self.scale = nn.Parameter(torch.empty(in_features, device=device), requires_grad=False)
        shift = torch.empty(num_shifts, in_features, device=device)
        self.register_parameter(
            "shift", nn.Parameter(shift, requires_grad=False) if num_shifts else None
        )

    @property
    def inv_scale(self) -> torch.Tensor:
        """[K] fp64, u = 1 / s."""
        return 1 / self.scale.double()


def install_folds(block: nn.Module, table: BlockTable, folds: dict[str, int]) -> None:
    """Give a block the modules that hold its folds, and mark the linears that a fold reaches.

    Args:
        block: with its packed linears in place.
        table: of the block.
        folds: site name -> number of shifts, 0 for a factor alone.

    Raises:
        CheckpointError: a site that the family does not have, or that nothing folds into.
    """
    if not folds:
        return
    by_name = {site.name: site for site in table.sites}
    modules = nn.ModuleDict()
    for name, num_shifts in folds.items():
        site = by_name.get(name)
        if site is None or not isinstance(site.producer, AdaLN | ValueRows):
            raise CheckpointError(
                f"scheme: folds name a site {name!r}, which the family cannot fold"
            )
        modules[name] = Fold(get_linear(block, site.consumers[0]).in_features, num_shifts)
        for linear in (*site.consumers, *producers(site)):
            layer = block.get_submodule(linear)
            if isinstance(layer, QuantLinear):
                layer.folded = True
    setattr(block, FOLDS, modules)


def folds_in(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The folds among stored tensors (full name -> shape), as a scheme lists them: `BLOCK.SITE` -> shifts."""
    found: dict[str, int] = {}
    for name in shapes:
        block, inside, rest = name.partition(f".{FOLDS}.")
        site, _, field = rest.rpartition(".")
        if inside and field == "scale":
            shift = shapes.get(f"{block}.{FOLDS}.{site}.shift", (0,))
            found[f"{block}.{site}"] = shift[0]
    return dict(sorted(found.items()))


def producers(site: Site) -> tuple[str, ...]:
    """The linears whose rows a fold of the site scaled."""
    match site.producer:
        case AdaLN(modulation):
            return (modulation,)
        case ValueRows(values):
            return values
    return ()

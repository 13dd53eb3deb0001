"""The format of a site, one input that linears share: who reads it, what was done to it and where.

A site's transform is x' = (x - shift) * smooth_inv, then quantized. docs/format.md is the prose twin of this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.layer import ACTIVATIONS, Stored
from ditq_runtime.format.rules import Rule, check_record

SITES = "ditq_sites"  # name of the module in a block that holds its sites
PLACES = ("quantizer", "adaln", "value", "norm", "product")
ROWS = ("adaln", "value", "product")  # places in the rows of linears
RULES = {
    "readers": Rule(list, items=str),
    "activations": Rule(str, ACTIVATIONS),
    "place": Rule(str, PLACES),
    "smooth": Rule(bool),
    "shifts": Rule(int, least=0),
    "rest": Rule(bool, optional=True),
    "producers": Rule(dict, items=list, optional=True),
}


@dataclass(frozen=True)
class SiteFormat:
    """One site.

    Attributes:
        readers: full names of the linears that read it.
        activations: how it is quantized, as in `LayerFormat`; `none` where all its readers are float.
        place: where its transform went: into the `quantizer`, which applies it; or folded into a producer: the rows
            of an `adaln` modulation, the rows of V (`value`), the weights of a `norm`, the rows of the linear factor
            of a gated MLP (`product`).
        smooth: it is multiplied by a factor per channel.
        shifts: S, shifts it is taken from: 0 none, 1 one for all timesteps, else one per timestep group.
        rest: a producer absorbed the factors of its own channels, and the quantizer applies those of the rest.
        producers: of a fold into rows: full name of a linear or table -> where its scaled rows begin; from each on, as
            many rows as the site has channels, or all that follow.
    """

    readers: tuple[str, ...]
    activations: str
    place: str = "quantizer"
    smooth: bool = False
    shifts: int = 0
    rest: bool = False
    producers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        if not self.readers or len(set(self.readers)) < len(self.readers):
            raise CheckpointError(
                "site: readers must be names of linears, each once, and at least one"
            )
        if self.activations == "none" and (self.rest or not self.is_folded):
            raise CheckpointError(
                "site: without quantized activations nothing may be left to a quantizer"
            )
        if self.rest and not self.is_folded:
            raise CheckpointError("site: rest belongs to a fold")
        if self.producers and self.place not in ROWS:
            raise CheckpointError(
                f"site: a transform in a {self.place} scales no rows of producers"
            )

    @classmethod
    def from_dict(cls, stored: object, where: str) -> SiteFormat:
        """Read a stored site; CheckpointError for anything unknown, missing or contradictory."""
        found = check_record(stored, RULES, where)
        producers: dict[str, tuple[int, ...]] = {}
        for name, rows in found.get("producers", {}).items():
            if not rows or not all(type(row) is int and row >= 0 for row in rows):
                raise CheckpointError(f"{where}: producers: {name} must list where its rows begin")
            producers[name] = tuple(rows)
        return cls(**{**found, "readers": tuple(found["readers"]), "producers": producers})

    def to_dict(self) -> dict[str, object]:
        """As stored; what is empty is left out."""
        stored = asdict(self) | {"readers": list(self.readers)}
        stored["producers"] = {name: list(rows) for name, rows in self.producers.items()}
        return {k: v for k, v in stored.items() if v or k not in ("rest", "producers")}

    @property
    def is_folded(self) -> bool:
        """A producer absorbed the transform."""
        return self.place != "quantizer"

    @property
    def quantizer_smooths(self) -> bool:
        """The quantizer multiplies by a factor."""
        return self.rest if self.is_folded else self.smooth

    @property
    def quantizer_shifts(self) -> int:
        """Shifts that the quantizer subtracts."""
        return 0 if self.is_folded else self.shifts

    def tensors(self, in_features: int) -> Stored:
        """The tensors stored for a site of K channels: what the quantizer applies, then what was folded."""
        k, stored = in_features, Stored()
        if self.quantizer_smooths:
            stored["smooth_inv"] = (torch.float32, (k,))
        if self.quantizer_shifts:
            stored["shift"] = (torch.float32, (self.shifts, k))
        if self.activations == "static":
            stored["act_scale"] = (torch.float32, (1,))
            stored["act_zero"] = (torch.int32, (1,))
        if self.is_folded and self.smooth:
            stored["scale"] = (torch.float32, (k,))
        if self.is_folded and self.shifts:
            stored["fold_shift"] = (torch.float32, (self.shifts, k))
        return stored

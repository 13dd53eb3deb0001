"""The plan of a conversion: an object that is made from choices, read and changed by people, and carried out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ditq_converters.methods import METHODS
from ditq_converters.plan.change import changed, parse_rule
from ditq_converters.plan.entries import (
    MODULATION,
    AttentionPlan,
    LinearPlan,
    SitePlan,
    needs_rows,
)

KEPT_DTYPES = ("fp32", "bf16")


@dataclass
class Plan:
    """What happens to a model. Its entries are frozen; `set` exchanges them.

    Attributes:
        architecture: diffusers class name of the transformer.
        sites: in the order they run.
        linears: every linear of the model, blocks first.
        attention: the attention modules that ditq knows.
        kept_dtype: what tensors that stay float are stored in: `fp32` (as the model was opened) or `bf16`.
    """

    architecture: str
    sites: tuple[SitePlan, ...]
    linears: tuple[LinearPlan, ...]
    attention: tuple[AttentionPlan, ...] = ()
    kept_dtype: str = "fp32"

    def __post_init__(self) -> None:
        """Check what is not part of an entry."""
        if self.kept_dtype not in KEPT_DTYPES:
            raise ValueError(
                f"plan: kept_dtype must be one of {', '.join(KEPT_DTYPES)}, got {self.kept_dtype!r}"
            )

    @property
    def needs_statistics(self) -> bool:
        """Whether a calibration must have run."""
        transforms = any(METHODS[site.method].needs_statistics for site in self.sites)
        static = any(linear.activations == "static" for linear in self.linears)
        return transforms or static or self.needs_rows or self.needs_operands

    @property
    def needs_rows(self) -> bool:
        """Whether the calibration must have sampled rows."""
        readers = self.readers()
        ranged = any(e.site == MODULATION and e.activations == "static" for e in self.linears)
        return ranged or any(needs_rows(site, readers[site.name]) for site in self.sites)

    @property
    def needs_operands(self) -> bool:
        """Whether the calibration must have ranges of Q, K and V."""
        return any(a.values != "none" and a.scales == "static" for a in self.attention)

    def readers(self) -> dict[str, list[LinearPlan]]:
        """Site name -> the linears that read it."""
        found: dict[str, list[LinearPlan]] = {site.name: [] for site in self.sites}
        for linear in self.linears:
            if linear.site in found:
                found[linear.site].append(linear)
        return found

    def part(self, name: str) -> Part:
        """The entries of a block, or of the final modulation."""
        start = f"{name}."
        return Part(
            {s.name.removeprefix(start): s for s in self.sites if s.name.startswith(start)},
            {e.name: e for e in self.linears if e.name == name or e.name.startswith(start)},
            {a.name: a for a in self.attention if a.name.startswith(start)},
        )

    def set(self, pattern: str, **values: Any) -> Plan:
        """Change the entries that a pattern names; `copy.copy(plan)` first to keep the old plan.

        Args:
            pattern: glob of names. Fields of linears reach the readers of a site that is named, fields of a site the
                site of a linear that is named.
            **values: field -> value; what is no field is an option of the site's method.

        Returns:
            This plan.

        Raises:
            ValueError: nothing has such a name, the entries have no such field, or an entry cannot have the value.
        """
        self.sites, self.linears, self.attention = changed(self, pattern, values)
        return self

    def set_rule(self, rule: str) -> Plan:
        """Change by a line of text, `PATTERN:field=value`; several fields with commas. Errors as `set`."""
        pattern, values = parse_rule(rule)
        return self.set(pattern, **values)


@dataclass(frozen=True)
class Part:
    """The entries of one block, as `convert` reads them.

    Attributes:
        sites: short site name -> entry.
        linears: full name -> entry.
        attention: full name -> entry.
    """

    sites: dict[str, SitePlan]
    linears: dict[str, LinearPlan]
    attention: dict[str, AttentionPlan]

    def readers_of(self, site: SitePlan) -> list[LinearPlan]:
        """The linears of the block that read a site."""
        return [self.linears[name] for name in site.readers]

"""The entries of a plan: what happens to one site, one linear, one attention, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ditq_converters.methods import METHODS
from ditq_converters.methods.base import SHIFTS, check_kind
from ditq_converters.methods.ranges import RANGE_METHODS
from ditq_runtime.format.attention import SCALES, VALUES, AttentionFormat
from ditq_runtime.format.layer import GROUPED, LayerFormat

PLACES = ("adaln", "value", "value+quantizer", "norm", "product", "quantizer")
SHIFTS_AT = {  # what a site can be shifted by where its transform goes there, as a rule
    "adaln": "groups",
    "value": "constant",
    "value+quantizer": "constant",
    "norm": "constant",
    "product": "none",
    "quantizer": "groups",
}
CALLS = ("all", "noisiest")
QUANTIZED = ("w8", "w4p", "w4g")
WEIGHTS = (*QUANTIZED, "fp32", "as it is")
ACTIVATIONS = ("token", "token_asym", "static", "none")
ITERATIONS = 400  # of learning a block, each on one call
BEHIND = ("aimed", "reconstruct")  # roundings behind all that is quantized before
ROUNDINGS = ("nearest", "gptq", *BEHIND)
WEIGHT_RANGES = ("minmax", "mse", "ptq4dit_pct")
MODULATION, OUTSIDE = "modulation", "outside"  # what stands for a site where a linear has none


@dataclass(frozen=True)
class SitePlan:
    """What happens to one input that linears share: X becomes (X - shift) / smooth.

    Attributes:
        name: `BLOCK.SITE`.
        readers: full names of the linears that read it.
        place: where factor and shift go: `adaln` (rows of a modulation), `value` (rows of V; `value+quantizer`: the
            channels beyond V in the quantizer), `norm`, `product`, or `quantizer` (on the fly).
        method: whose transform it gets; `linear`: none.
        options: choices of the method that are not its defaults.
        shifts: what it can be shifted by: `none`, `constant` or `groups` (one per timestep group).
        ranges: how the range of static activations is found: `minmax`, or a search on sampled rows.
        calls: of the statistics that ranges and rounding read: `all`, or the `noisiest` alone.
        reason: why, in words.
    """

    name: str
    readers: tuple[str, ...]
    place: str
    method: str = "linear"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    shifts: str = "none"
    ranges: str = "minmax"
    calls: str = "all"
    reason: str = ""

    def __post_init__(self) -> None:
        """Check every field by itself."""
        _one_of(self.name, "place", self.place, PLACES)
        if self.method not in METHODS:
            _one_of(self.name, "method", self.method, tuple(METHODS))
        _one_of(self.name, "shifts", self.shifts, SHIFTS)
        _one_of(self.name, "ranges", self.ranges, RANGE_METHODS)
        _one_of(self.name, "calls", self.calls, CALLS)
        try:
            self.method_options  # noqa: B018  it checks them
        except (ValueError, TypeError) as error:
            raise ValueError(f"plan: {self.name}: {error}") from error

    @property
    def method_options(self) -> Any:
        """What the method's transform is told."""
        return METHODS[self.method].options_from(self.options)

    @property
    def transforms(self) -> bool:
        """Whether its method transforms at all."""
        return METHODS[self.method].transform is not None

    @property
    def only_call(self) -> int | None:
        """The one call that ranges and rounding read; None: all."""
        return 0 if self.calls == "noisiest" else None


@dataclass(frozen=True)
class LinearPlan:
    """What happens to one linear.

    Attributes:
        name: full module name.
        shape: outputs N and inputs K.
        site: of its input; `modulation` for AdaLN linears, which read none or one of their own, `outside` for what lies
            outside the blocks.
        weights: `w8`, `w4p`, `w4g`, `fp32` (kept, in the checkpoint's own layer) or `as it is` (untouched).
        activations: `token`, `token_asym` (with a zero point), `static`, or `none` (weight-only).
        group_size: input channels per group of `w4p` or `w4g`.
        symmetric: `w4g` without zero points.
        rank: of the low-rank branch beside the integer product; 0: none.
        rounding: `nearest`, `gptq`, `aimed`: gptq towards the float model's outputs behind all that is quantized
            before, or `reconstruct`: learned with its block, from there on.
        bias_correction: take its mean output error on sampled rows back through its bias.
        iterations: of learning, where it is reconstructed; a block takes the most that one of its linears has.
        weight_ranges: `minmax`; or a search that clips, by squared error: `mse` or `ptq4dit_pct`
            (`convert.weight_ranges`).
        reason: why, in words.
    """

    name: str
    shape: tuple[int, int]
    site: str
    weights: str
    activations: str = "none"
    group_size: int | None = None
    symmetric: bool = False
    rank: int = 0
    rounding: str = "nearest"
    bias_correction: bool = False
    iterations: int = ITERATIONS
    weight_ranges: str = "minmax"
    reason: str = ""

    def __post_init__(self) -> None:
        """Check every field by itself, and those that go together."""
        _one_of(self.name, "weights", self.weights, WEIGHTS)
        _one_of(self.name, "activations", self.activations, ACTIVATIONS)
        _one_of(self.name, "rounding", self.rounding, ROUNDINGS)
        _one_of(self.name, "weight_ranges", self.weight_ranges, WEIGHT_RANGES)
        for switch in ("symmetric", "bias_correction"):
            check_kind(f"plan: {self.name}: {switch}", False, getattr(self, switch))
        if (self.weights in GROUPED) != (self.group_size is not None):
            raise ValueError(
                f"plan: {self.name}: group_size belongs to w4p and w4g, got weights {self.weights!r} and group_size "
                f"{self.group_size}"
            )
        if self.symmetric and self.weights != "w4g":
            raise ValueError(
                f"plan: {self.name}: symmetric is a choice of w4g, got weights {self.weights!r}"
            )
        if type(self.rank) is not int or self.rank < 0:
            raise ValueError(
                f"plan: {self.name}: rank must be a count, 0 for none, got {self.rank!r}"
            )
        if type(self.iterations) is not int or self.iterations < 1:
            raise ValueError(
                f"plan: {self.name}: iterations must be at least 1, got {self.iterations!r}"
            )
        needs = {
            "activations": self.activations != "none",
            "rank": self.rank > 0,
            "rounding": self.rounding != "nearest",
            "bias_correction": self.bias_correction,
            "weight_ranges": self.weight_ranges != "minmax",
        }
        asked = next((name for name, given in needs.items() if given), None)
        if asked and self.weights not in QUANTIZED:
            raise ValueError(
                f"plan: {self.name}: {asked} is for quantized weights, got weights {self.weights!r}"
            )
        if self.rank and (self.activations == "none" or self.site == MODULATION):
            raise ValueError(
                f"plan: {self.name}: a low-rank branch is for linears that read a site with quantized activations"
            )

    @property
    def is_integer(self) -> bool:
        """Both operands of its product are integers."""
        return self.activations != "none"

    @property
    def runs_model(self) -> bool:
        """Whether its rounding reads what the packed model will show to it."""
        return self.rounding in BEHIND

    @property
    def needs_rows(self) -> bool:
        """Whether it is rounded or corrected by sampled rows, or they tell the range of its input."""
        ranged = self.site == MODULATION and self.activations == "static"
        return self.rounding != "nearest" or self.bias_correction or ranged

    def layer_format(self, bias: bool, groups: int = 1) -> LayerFormat | None:
        """Its format in the checkpoint; None where it stays as it is.

        Args:
            bias: it has one.
            groups: timestep groups of its bias.
        """
        if self.weights == "as it is":
            return None
        return LayerFormat(self.weights, self.activations, self.group_size, bias, groups, self.rank)


@dataclass(frozen=True)
class AttentionPlan:
    """What happens to one attention module.

    Attributes:
        name: full module name.
        values: `none` (float), `int8` or `bf16`: the type of P and V; Q and K are int8.
        scales: `token` or `static` (calibrated, per head).
        calls: of the statistics that static scales read: `all`, or the `noisiest` alone.
        reason: why, in words.
    """

    name: str
    values: str = "none"
    scales: str = "token"
    calls: str = "all"
    reason: str = ""

    def __post_init__(self) -> None:
        """Check every field by itself."""
        _one_of(self.name, "values", self.values, ("none", *VALUES))
        _one_of(self.name, "scales", self.scales, SCALES)
        _one_of(self.name, "calls", self.calls, CALLS)

    @property
    def format(self) -> AttentionFormat | None:
        """How its products run; None: in float."""
        return None if self.values == "none" else AttentionFormat(self.values, self.scales)

    @property
    def only_call(self) -> int | None:
        """The one call that static scales read; None: all."""
        return 0 if self.calls == "noisiest" else None


Entry = SitePlan | LinearPlan | AttentionPlan


def needs_rows(entry: SitePlan, readers: list[LinearPlan]) -> bool:
    """Whether a site and its readers are carried out by sampled rows."""
    readers = [reader for reader in readers if reader.weights in QUANTIZED]
    searches = entry.ranges != "minmax" and any(r.activations == "static" for r in readers)
    reads = METHODS[entry.method].reads_rows(entry.method_options)
    return searches or (reads and bool(readers)) or any(reader.needs_rows for reader in readers)


def _one_of(name: str, field_name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"plan: {name}: {field_name} must be one of {', '.join(choices)}, got {value!r}"
        )

"""Recipe: the choices of a conversion as keywords, validated once. `make_plan` turns them into a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatch
from typing import Any

from ditq_converters.methods import METHODS
from ditq_converters.methods.ranges import RANGE_METHODS
from ditq_converters.plan.entries import ACTIVATIONS as ALL_ACTIVATIONS
from ditq_converters.plan.entries import ITERATIONS, QUANTIZED, ROUNDINGS, WEIGHT_RANGES
from ditq_converters.plan.plan import KEPT_DTYPES
from ditq_runtime.format.attention import SCALES, VALUES, AttentionFormat

ACTIVATIONS = tuple(name for name in ALL_ACTIVATIONS if name != "none")
ATTENTION = ("none", *VALUES)


@dataclass(frozen=True)
class Recipe:
    """How to convert, in one form for all linears.

    Attributes:
        method: a name in `ditq_converters.methods.METHODS`.
        weights: `w8` (int8 per output channel), `w4p` (4 bits, two-level groups; a width that no group divides takes
            `w8`) or `w4g` (4 bits, a real scale and zero point per group, as the papers have it; slower, the
            reference for accuracy).
        activations: `token` (a scale per token, computed when it runs), `token_asym` (a scale and a zero point per
            token) or `static` (calibrated range).
        group_size: input channels per group of `w4p` or `w4g`; lowered per layer to a divisor of its inputs; None: as
            the method has it (64; Meta: 128).
        modulation: weights of the AdaLN modulation linears (weight-only); None: the same as `weights`.
        modulation_activations: what AdaLN modulation linears of blocks read: `none` (float; they are weight-only), or
            int8 as `activations` has it (PTQ4DiT and HTG quantize their inputs).
        keep: glob patterns of module names that stay float.
        attention: `none` (float), `int8` (Q K^T and P V in int8) or `bf16` (Q K^T in int8, P V in bf16); None: as the
            method has it, in the modules that can.
        attention_scales: `token` (computed when it runs) or `static` (calibrated, per head); None: as `activations`.
        lora_rank: rank of the low-rank branch beside the integer product; None: as the method has it; 0: none.
        range_method: of static activations: `minmax` (all that calibration met), or searched on sampled rows:
            `qdiff_mse` (Q-Diffusion, arXiv:2302.04304), `ptq4dit_pct` (PTQ4DiT, arXiv:2405.16005).
        weight_range_method: of weights: `minmax`, or searched by squared error: `mse` (both ends shrunk), `ptq4dit_pct`
            (quantiles per output channel, PTQ4DiT). `w4p` searches the ranges of its groups anyway.
        rounding: of weights: `nearest`; `gptq`, which passes the error of a column on to later ones by the sampled
            rows (arXiv:2210.17323), those of modulation linears included; `aimed`, gptq towards the float model's
            outputs behind all that is quantized before, on replayed calls; or `reconstruct`, learned block by block
            from there on (arXiv:2102.05426, as PTQ4DiT does).
        iterations: of learning each block, where rounding is `reconstruct`; PTQ4DiT takes 20000.
        bias_correction: take the mean output error of every site's linear on the sampled rows back through its bias
            (arXiv:1906.04721), per timestep group where the bias is a table; a linear without a bias gets none.
        symmetric: `w4g` weights without zero points; None: as the method has it (Meta: symmetric).
        kept_dtype: what tensors that stay float are stored in: `fp32` (as the model was opened) or `bf16`.
        alpha: of smoothquant, and of ditas without its search; this and the fields below: see the options of the
            methods (`ditq_converters.methods`). A method reads those that it has.
        options: choices of a method that a package brings.

    Raises:
        ValueError: a field is out of its range; the message lists the choices.
    """

    method: str = "smoothquant"
    weights: str = "w8"
    activations: str = "token"
    group_size: int | None = None
    modulation: str | None = None
    modulation_activations: str = "none"
    keep: tuple[str, ...] = ()
    lora_rank: int | None = None
    alpha: float = 0.5
    search: bool = True
    ssc: bool = True
    shift: bool = True
    scale: bool = True
    num_groups: int | None = None
    linkage: str = "ward"
    ema: float = 0.99
    groups_per_layer: bool = False
    range_method: str = "minmax"
    weight_range_method: str = "minmax"
    rounding: str = "nearest"
    symmetric: bool | None = None
    attention: str | None = None
    attention_scales: str | None = None
    bias_correction: bool = False
    iterations: int = ITERATIONS
    kept_dtype: str = "fp32"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Validate every field."""
        if isinstance(self.keep, str) or not all(isinstance(one, str) for one in self.keep):
            raise ValueError(f"recipe: keep must be a tuple of patterns, got {self.keep!r}")
        _one_of("method", self.method, tuple(METHODS))
        _one_of("weights", self.weights, QUANTIZED)
        _one_of("activations", self.activations, ACTIVATIONS)
        _one_of("attention", self.attention or "none", ATTENTION)
        _one_of("attention_scales", self.attention_scales or self.attention_default, SCALES)
        _one_of("modulation", self.modulation or self.weights, QUANTIZED)
        _one_of("modulation_activations", self.modulation_activations, ALL_ACTIVATIONS)
        _one_of("kept_dtype", self.kept_dtype, KEPT_DTYPES)
        if self.group < 32 or self.group % 32:
            raise ValueError(
                f"recipe: group_size must be a positive multiple of 32, got {self.group}"
            )
        if self.symmetric is not None and "w4g" not in (self.weights, self.modulation_weights):
            raise ValueError(
                f"recipe: symmetric is a choice of w4g weights, got weights {self.weights!r}"
            )
        if self.iterations < 1:
            raise ValueError(f"recipe: iterations must be at least 1, got {self.iterations}")
        _one_of("rounding", self.rounding, ROUNDINGS)
        _one_of("weight_range_method", self.weight_range_method, WEIGHT_RANGES)
        _one_of("range_method", self.range_method, RANGE_METHODS)
        if self.range_method != "minmax" and self.activations != "static":
            raise ValueError(
                f"recipe: range_method {self.range_method} is for static activations, got {self.activations}"
            )
        if self.rank < 0:
            raise ValueError(f"recipe: lora_rank must not be negative, got {self.rank}")
        try:
            METHODS[self.method].options_from(self.method_options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"recipe: {error}") from error

    @classmethod
    def of(cls, **choices: Any) -> Recipe:
        """A recipe from keywords; what is no field of it is an option of the method."""
        own = {entry.name for entry in fields(cls)}
        options = {name: value for name, value in choices.items() if name not in own}
        given = {name: value for name, value in choices.items() if name in own}
        return cls(**{**given, "options": {**given.get("options", {}), **options}})

    @property
    def group(self) -> int:
        """Input channels per group."""
        return METHODS[self.method].group_size if self.group_size is None else self.group_size

    @property
    def rank(self) -> int:
        """Rank of the low-rank branch."""
        return METHODS[self.method].lora_rank if self.lora_rank is None else self.lora_rank

    @property
    def symmetric_weights(self) -> bool:
        """Whether `w4g` weights have no zero points."""
        return METHODS[self.method].symmetric if self.symmetric is None else self.symmetric

    @property
    def method_options(self) -> dict[str, Any]:
        """What the method is told, where it is not its default."""
        method, own = METHODS[self.method], {entry.name for entry in fields(self)}
        defaults = method.options()
        told = {name: getattr(self, name) for name in method.option_names if name in own}
        told = {name: value for name, value in told.items() if value != getattr(defaults, name)}
        return {**told, **self.options}

    @property
    def attention_default(self) -> str:
        """Scales of attention where nobody says."""
        return "static" if self.activations == "static" else "token"

    @property
    def attention_format(self) -> AttentionFormat | None:
        """How attention products run; None: in float."""
        values = self.attention or METHODS[self.method].attention
        scales = self.attention_scales or self.attention_default
        return None if values == "none" else AttentionFormat(values, scales)

    @property
    def modulation_weights(self) -> str:
        """Weights of the modulation linears."""
        return self.modulation or self.weights

    def keeps(self, layer: str) -> bool:
        """Whether a module stays float."""
        return any(fnmatch(layer, pattern) for pattern in self.keep)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, for reports."""
        attention = self.attention_format
        return {
            **asdict(self),
            "keep": list(self.keep),
            "modulation": self.modulation_weights,
            "group_size": self.group,
            "lora_rank": self.rank,
            "symmetric": self.symmetric_weights,
            "attention": "none" if attention is None else attention.values,
            "attention_scales": None if attention is None else attention.scales,
        }


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"recipe: {name} must be one of {', '.join(choices)}, got {value!r}")

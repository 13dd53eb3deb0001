"""Quantize a float checkpoint while diffusers loads it: no data, no folding, one layer at a time as its weights arrive.

What it makes is what `ditq convert --method linear --activations token` makes, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape

import torch
from torch import nn

import ditq_kernels as k
from ditq_runtime.attention.install import unsupported
from ditq_runtime.families import family_of, get_linear
from ditq_runtime.families.placing import placed_sites
from ditq_runtime.format.attention import AttentionFormat
from ditq_runtime.format.layer import ZERO_POINT, LayerFormat
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.format.stored_weight import STORED, quantize_weight, stored_tensors

WEIGHTS = ("w8", "w4p", "w4g")
ACTIVATIONS = ("token", "token_asym")
ATTENTION = ("none", "int8", "bf16")


@dataclass(frozen=True)
class Choice:
    """What a user asks of on-the-fly quantization.

    Attributes:
        weights: `w8`, `w4p` or `w4g` (with zero points).
        activations: `token` or `token_asym`; a calibrated range needs `ditq convert`.
        group_size: inputs per `w4p` or `w4g` group; lowered per layer to a divisor of its inputs.
        modulation: weights of the modulation linears (weight-only); None: the same as `weights`.
        keep: glob patterns of layers and attentions that stay float.
        attention: type of P and V where attention runs quantized, with token scales: `int8` or `bf16`; `none`: float.

    Raises:
        ValueError: a field is out of its range; the message lists the choices.
    """

    weights: str
    activations: str = "token"
    group_size: int = 64
    modulation: str | None = None
    keep: tuple[str, ...] = ()
    attention: str = "none"

    def __post_init__(self) -> None:
        """Validate every field."""
        if self.activations == "static":
            raise ValueError(
                "DitqConfig: static activations need a calibration, and loading sees no data; "
                "take activations='token', or make the checkpoint with `ditq convert`"
            )
        for field, value, choices in (
            ("weights", self.weights, WEIGHTS),
            ("modulation", self.modulation or self.weights, WEIGHTS),
            ("activations", self.activations, ACTIVATIONS),
            ("attention", self.attention, ATTENTION),
        ):
            if value not in choices:
                raise ValueError(
                    f"DitqConfig: {field} must be one of {', '.join(choices)}, got {value!r}"
                )
        if self.group_size < 32 or self.group_size % 32:
            raise ValueError(
                f"DitqConfig: group_size must be a positive multiple of 32, got {self.group_size}"
            )
        if isinstance(self.keep, str):
            raise ValueError(
                f"DitqConfig: keep must be a tuple of patterns, got the string {self.keep!r}"
            )


def choose_formats(model: nn.Module, choice: Choice) -> Scheme:
    """The scheme that a choice gives a float transformer (on meta is enough).

    Raises:
        ValueError: no adapter for this class, a keep pattern that matches nothing, a layer whose inputs no group
            size divides, an attention that cannot run quantized.
    """
    family = family_of(type(model).__name__)
    named: dict[str, LayerFormat] = {}
    for block, table in family.block_tables(model).items():
        for name in table.linears:
            layer = f"{block}.{name}"
            weights, activations = choice.weights, choice.activations
            if name in table.modulations:
                weights, activations = choice.modulation or choice.weights, "none"
            named[layer] = _format(model, layer, weights, activations, choice)
    if family.final_modulation is not None:
        name = family.final_modulation
        named[name] = _format(model, name, "w8", "none", choice)
    attentions = [] if choice.attention == "none" else family.attention_names(model)
    known = [*named, *attentions]
    for pattern in choice.keep:
        if not any(fnmatch(name, pattern) for name in known):
            raise ValueError(
                f"DitqConfig: keep pattern {pattern!r} matches none of the {len(known)} quantized modules"
            )
    attention = _attention_formats(model, attentions, choice)
    sites = placed_sites(model, family, named)
    return Scheme.of(type(model).__name__, False, named, sites, attention)


def _attention_formats(
    model: nn.Module, names: list[str], choice: Choice
) -> dict[str, AttentionFormat]:
    if choice.attention == "none":
        return {}
    if not names:
        raise ValueError(
            f"{type(model).__name__}: its attention does not run quantized yet; leave attention out"
        )
    wanted = AttentionFormat(choice.attention, "token")
    formats = {}
    for name in names:
        if any(fnmatch(name, pattern) for pattern in choice.keep):
            continue
        reason = unsupported(model.get_submodule(name))
        if reason:
            raise ValueError(f"{name}: {reason}; leave attention out or keep=('{name}',)")
        formats[name] = wanted
    return formats


def _format(
    model: nn.Module, layer: str, weights: str, activations: str, choice: Choice
) -> LayerFormat:
    linear = get_linear(model, layer)
    bias = linear.bias is not None
    if any(fnmatch(layer, pattern) for pattern in choice.keep):
        return LayerFormat("fp32", "none", bias=bias)
    if weights == "w8":
        return LayerFormat("w8", activations, bias=bias)
    try:
        group_size = k.resolve_group_size(
            linear.in_features, choice.group_size, one_group=weights == "w4g"
        )
    except ValueError as error:
        raise ValueError(
            f"{layer}: {error}; keep it float with keep=('{layer}',) or take weights='w8'"
        ) from error
    return LayerFormat(weights, activations, group_size, bias=bias)


ScaleRows = dict[str, list[slice]]


def scale_rows(model: nn.Module) -> ScaleRows:
    """Modulation linears and tables of a float transformer -> their rows that emit an AdaLN scale."""
    found: ScaleRows = {}
    for block, table in family_of(type(model).__name__).block_tables(model).items():
        for name in table.tables:
            full = f"{block}.{name}"
            found[full] = table.scale_rows(name, model.get_parameter(full).numel())
        for name in table.modulations:
            full = f"{block}.{name}"
            found[full] = table.scale_rows(name, get_linear(model, full).out_features)
    return found


class PackedView(Mapping[str, torch.Tensor]):
    """A float state dict seen as the packed one: a layer is quantized when it is read, so one is held at a time.

    Args:
        source: tensors of a float checkpoint, or of one shard of it.
        scheme: of `choose_formats`.
        direct: of `scale_rows`: modulations that emit the multiplier 1 + scale itself.
    """

    def __init__(
        self,
        source: Mapping[str, torch.Tensor],
        scheme: Scheme,
        direct: ScaleRows | None = None,
    ) -> None:
        """Name what will be there; quantize nothing yet."""
        self._source, self._scheme, self._direct = source, scheme, direct or {}
        self._source_of: dict[str, str] = {}  # packed name -> float name
        for name in source:
            self._source_of |= dict.fromkeys(self._packed_names(name), name)
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def __getitem__(self, name: str) -> torch.Tensor:
        """One stored tensor.

        Raises:
            ValueError: its float tensor holds a value that is not finite.
        """
        source = self._source_of[name]
        if self._last[0] != source:
            self._last = (source, self._pack(source, self._source[source]))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        """Packed names; those of one layer stand together."""
        return iter(self._source_of)

    def __len__(self) -> int:
        """Number of stored tensors."""
        return len(self._source_of)

    def _packed_names(self, name: str) -> list[str]:
        if name in self._direct:
            return table_names(name)
        layer, _, field = name.rpartition(".")
        if field != "weight" or layer not in self._scheme.layers:
            return [name]
        return [f"{layer}.{part}" for part in weight_fields(self._scheme.format_of(layer))]

    def _pack(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        layer, _, field = name.rpartition(".")
        if name in self._direct:
            bias = _plus_one(value.reshape(-1), self._direct[name])
            return dict(zip(table_names(name), (torch.ones_like(bias), bias), strict=True))
        if layer not in self._scheme.layers:
            return {name: value}
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{name}: holds a value that is not finite; check the source checkpoint"
            )
        if field == "bias":
            return {name: _plus_one(value, self._direct.get(layer, []))}
        stored = _quantize(value, self._scheme.format_of(layer))
        return {f"{layer}.{part}": tensor for part, tensor in stored.items()}


def pack_in_place(
    state: dict[str, torch.Tensor], scheme: Scheme, direct: ScaleRows | None = None
) -> None:
    """Turn a float state dict into the packed one, tensor by tensor: the float ones are let go of as it proceeds."""
    for name in list(state):
        one = {name: state.pop(name)}
        state |= PackedView(one, scheme, direct)


def substrings(names: Sequence[str]) -> tuple[str, ...]:
    """Parts of names, as other backends list what stays float, as glob patterns.

    Raises:
        ValueError: a string in place of a list, or an empty part, which every name holds.
    """
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"DitqConfig: modules_to_not_convert must be a list of parts of names, got {names!r}"
        )
    return tuple(name if "*" in name else f"*{escape(name)}*" for name in names)


def rename_tables(keys: list[str], direct: ScaleRows) -> None:
    """Turn the names of a float checkpoint's modulation tables, in place, into those of the stored tensors."""
    for name in set(keys) & direct.keys():
        keys.remove(name)
        keys += table_names(name)


def made_names(scheme: Scheme) -> Iterator[str]:
    """Names of the stored tensors that no float checkpoint has."""
    for layer in scheme.layers:
        for field in weight_fields(scheme.format_of(layer)):
            if field != "weight":
                yield f"{layer}.{field}"


def table_names(name: str) -> list[str]:
    """The stored tensors that a modulation table becomes: its factors, all one, and its rows."""
    return [f"{name}.weight", f"{name}.bias"]


def weight_fields(layer_format: LayerFormat) -> tuple[str, ...]:
    """The stored tensors that a layer's float weight becomes."""
    if layer_format.weights == "fp32":
        return ("weight",)
    sums = ("weight_sum",) if layer_format.activations in ZERO_POINT else ()
    return (*STORED[layer_format.weights], *sums)


def _quantize(weight: torch.Tensor, layer_format: LayerFormat) -> dict[str, torch.Tensor]:
    if layer_format.weights == "fp32":
        return {"weight": weight.float()}
    quantized = quantize_weight(weight, layer_format)
    stored = stored_tensors(quantized, layer_format)
    if layer_format.activations in ZERO_POINT:
        stored["weight_sum"] = quantized.weight_sum()
    return stored


def _plus_one(bias: torch.Tensor, rows: list[slice]) -> torch.Tensor:
    """A bias or table [N] in fp32 whose scale rows gain a one: what is emitted is the AdaLN multiplier itself."""
    wide = bias.double().clone()
    for part in rows:
        wide[part] += 1.0
    return wide.float()

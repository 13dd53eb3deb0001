"""What a packed transformer is: one format per kind of layer, and the list of layers that have it.

The scheme is the part of `config.json` that the runtime reads. How the file was made (the recipe) is provenance only.
docs/format.md is the prose twin of this file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

import ditq_kernels as kernels
from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.attention import AttentionFormat
from ditq_runtime.layers.timestep_freq import SHIFT_OF

WEIGHTS = ("w8", "w4p", "w4g", "fp32")
GROUPED = ("w4p", "w4g")  # weights whose codes share scales along the inputs
GEMMS = {"w8": "gemm_w8a8", "w4p": "gemm_w4a8", "w4g": "gemm_w4a8_per_group"}
LINEARS = {"w8": "linear_w8", "w4p": "linear_w4", "w4g": "linear_w4_per_group"}
ACTIVATIONS = ("token", "static", "none")


@dataclass(frozen=True)
class LayerFormat:
    """How one linear is stored and run.

    Attributes:
        weights: `w8` int8 per output channel, `w4p` 4-bit two-level groups, `w4g` 4-bit with a real scale per
            group, `fp32` unquantized.
        activations: `token` int8 with one scale per token, computed when it runs; `static` int8 with one
            calibrated scale and zero point; `none` float (a weight-only layer, as modulation linears are).
        group_size: input channels that share a group of `w4p` or `w4g`; None for the other weights.
        smooth: the layer divides its input by a stored factor before quantizing (no producer could absorb it).
        bias: the layer has a bias.
        groups: timestep groups of the bias; 1: one bias for all timesteps.
        lora_rank: rank of the low-rank branch that the codes leave to it; 0: none.
    """

    weights: str
    activations: str
    group_size: int | None = None
    smooth: bool = False
    bias: bool = True
    groups: int = 1
    lora_rank: int = 0

    def __post_init__(self) -> None:
        """Refuse combinations that no op runs."""
        if self.weights not in WEIGHTS:
            raise CheckpointError(f"format: weights must be one of {WEIGHTS}, got {self.weights!r}")
        if self.activations not in ACTIVATIONS:
            raise CheckpointError(
                f"format: activations must be one of {ACTIVATIONS}, got {self.activations!r}"
            )
        for field in ("smooth", "bias"):
            _check_type(f"format: {field}", getattr(self, field), bool)
        if (self.weights in GROUPED) != (self.group_size is not None):
            raise CheckpointError(
                f"format: group_size belongs to w4p and w4g and only there, got weights={self.weights!r}, "
                f"group_size={self.group_size!r}"
            )
        if self.weights == "fp32" and self.activations != "none":
            raise CheckpointError("format: fp32 weights cannot have quantized activations")
        if self.smooth and self.activations == "none":
            raise CheckpointError("format: smooth needs quantized activations")
        for field, least in (("groups", 1), ("lora_rank", 0)):
            value = getattr(self, field)
            if type(value) is not int or value < least:
                raise CheckpointError(
                    f"format: {field} must be a count of at least {least}, got {value!r}"
                )
        if self.groups > 1 and not self.bias:
            raise CheckpointError("format: timestep groups need a bias")
        if self.lora_rank and not self.integer_gemm:
            raise CheckpointError("format: a low-rank branch needs quantized activations")

    @property
    def name(self) -> str:
        """A readable name: `w8_token`, `w4p64_static_smooth`, `w8_weight_only`, `fp32`."""
        parts = [f"{self.weights}{self.group_size or ''}"]
        if self.weights != "fp32":
            parts.append("weight_only" if self.activations == "none" else self.activations)
        parts += ["smooth"] * self.smooth + ["nobias"] * (not self.bias)
        parts += [f"groups{self.groups}"] * (self.groups > 1)
        parts += [f"lora{self.lora_rank}"] * (self.lora_rank > 0)
        return "_".join(parts)

    @property
    def integer_gemm(self) -> bool:
        """Both operands of the matrix product are integers."""
        return self.activations != "none"

    @property
    def ops(self) -> tuple[str, ...]:
        """The `ditq::` ops one forward of the layer runs, in order."""
        if self.weights == "fp32":
            return ()
        if not self.integer_gemm:
            return (LINEARS[self.weights],)
        quantizer = "quantize_per_token" if self.activations == "token" else "quantize_static"
        low_rank = ("lora_down",) if self.lora_rank else ()
        return (quantizer, *low_rank, GEMMS[self.weights])

    def tensors(
        self, in_features: int, out_features: int
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors stored for a layer `[out_features, in_features]`: name -> dtype, shape."""
        k, n = in_features, out_features
        stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.weights == "fp32":
            stored["weight"] = (torch.float32, (n, k))
        elif self.weights == "w8":
            stored["weight"] = (torch.int8, (n, k))
            stored["weight_scale"] = (torch.float32, (n,))
        elif self.weights == "w4g":
            stored["weight"] = (torch.uint8, (n, k // 2))
            stored["weight_scale"] = (torch.float32, (n, self._groups(k)))
            stored["weight_zero"] = (torch.uint8, (n, self._groups(k)))
        else:
            groups = self._groups(k)
            stored["weight"] = (torch.uint8, (n, k // 2))
            stored["weight_scale"] = (torch.float32, (n,))
            stored["group_scale"] = (torch.uint8, (n, groups))
            stored["group_offset"] = (torch.int8, (n, groups))
        if self.activations == "static":
            sums = (n, self._groups(k)) if self.weights == "w4g" else (n,)
            stored["weight_sum"] = (torch.int32, sums)
            stored["act_scale"] = (torch.float32, (1,))
            stored["act_zero"] = (torch.int32, (1,))
        if self.smooth:
            stored["smooth_inv"] = (torch.float32, (k,))
        if self.bias:
            stored["bias"] = (torch.float32, (n,) if self.groups == 1 else (self.groups, n))
        if self.lora_rank:
            stored["lora_down"] = (torch.bfloat16, (self.lora_rank, k))
            stored["lora_up"] = (torch.bfloat16, (n, self.lora_rank))
        return stored

    def _groups(self, in_features: int) -> int:
        size = self.group_size
        if self.weights == "w4g" and type(size) is int and kernels.fits_w4g(in_features, size):
            return in_features // size
        if type(size) is not int or size < 32 or size % 32 or in_features % size:
            raise CheckpointError(
                f"format: group_size must be a multiple of 32 that divides the {in_features} inputs, "
                f"got {size!r}; convert again with another --group-size"
            )
        return in_features // size


@dataclass(frozen=True)
class Scheme:
    """Which layers of which architecture have which format.

    Attributes:
        architecture: the diffusers class name of the transformer.
        shared_embedder: the timestep and label embedder is stored once, in the first block.
        formats: name -> LayerFormat.
        layers: module name -> name of its format.
        folds: `BLOCK.SITE` -> number of shifts of a site whose factor went into its producer; 0: a factor alone.
        timestep_freq: `diffusers` or `dit`, how a DiT embeds its timestep (`ditq_runtime.layers.timestep_freq`).
        attention: name of an attention module -> its format; those that are absent stay float.
    """

    architecture: str
    shared_embedder: bool
    formats: dict[str, LayerFormat]
    layers: dict[str, str]
    folds: dict[str, int] = dataclasses.field(default_factory=dict)
    timestep_freq: str = "diffusers"
    attention: dict[str, AttentionFormat] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        architecture: str,
        shared_embedder: bool,
        layers: dict[str, LayerFormat],
        folds: dict[str, int] | None = None,
        attention: dict[str, AttentionFormat] | None = None,
    ) -> Scheme:
        """A scheme from the format of every layer, and of every attention that is quantized."""
        formats = {layer_format.name: layer_format for layer_format in layers.values()}
        names = {layer: layer_format.name for layer, layer_format in layers.items()}
        return cls(
            architecture, shared_embedder, formats, names, folds or {}, attention=attention or {}
        )

    def format_of(self, layer: str) -> LayerFormat:
        """The format of a module that the scheme lists."""
        return self.formats[self.layers[layer]]

    def folds_of(self, block: str) -> dict[str, int]:
        """The folds of a block: site name -> number of shifts."""
        found = (name.rpartition(".") for name in self.folds)
        return {site: self.folds[f"{owner}.{site}"] for owner, _, site in found if owner == block}

    def to_dict(self) -> dict[str, Any]:
        """As stored in `config.json`; without quantized attention, as it was before there was any."""
        stored = asdict(self)
        if not self.attention:
            del stored["attention"]
        return stored

    @classmethod
    def from_dict(cls, stored: Any) -> Scheme:
        """Read a stored scheme; CheckpointError for anything unknown, missing or contradictory."""
        _check_keys(stored, cls, "scheme", optional=("attention",))
        for key, kind in (
            ("architecture", str),
            ("shared_embedder", bool),
            ("formats", dict),
            ("layers", dict),
            ("folds", dict),
            ("timestep_freq", str),
        ):
            _check_type(f"scheme: {key}", stored[key], kind)
        for layer, name in stored["layers"].items():
            _check_type(f"scheme: the format of {layer}", name, str)
        for site, count in stored["folds"].items():
            _check_type(f"scheme: the number of shifts of {site}", count, int)
        formats = {}
        for name, entry in stored["formats"].items():
            _check_keys(entry, LayerFormat, f"scheme.formats.{name}")
            formats[name] = LayerFormat(**entry)
        if stored["timestep_freq"] not in SHIFT_OF:
            raise CheckpointError(
                f"scheme: timestep_freq must be one of {', '.join(SHIFT_OF)}, got {stored['timestep_freq']!r}"
            )
        unknown = sorted(set(stored["layers"].values()) - set(formats))
        if unknown:
            raise CheckpointError(f"scheme: layers name formats that are not defined: {unknown}")
        if not stored["layers"]:
            raise CheckpointError("scheme: no layer is listed, so nothing would be quantized")
        return cls(
            architecture=stored["architecture"],
            shared_embedder=stored["shared_embedder"],
            formats=formats,
            layers=dict(stored["layers"]),
            folds=dict(stored["folds"]),
            timestep_freq=stored["timestep_freq"],
            attention=_read_attention(stored.get("attention", {})),
        )


def _read_attention(stored: Any) -> dict[str, AttentionFormat]:
    _check_type("scheme: attention", stored, dict)
    for module, entry in stored.items():
        _check_keys(entry, AttentionFormat, f"scheme.attention.{module}")
    return {module: AttentionFormat(**entry) for module, entry in stored.items()}


def _check_type(what: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise CheckpointError(
            f"{what} must be of type {kind.__name__}, got {value!r}; the config.json is damaged"
        )


def _check_keys(stored: Any, kind: type, where: str, optional: tuple[str, ...] = ()) -> None:
    if not isinstance(stored, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(stored).__name__}")
    expected = {field.name for field in fields(kind)}
    missing = sorted(expected - set(stored) - set(optional))
    extra = sorted(set(stored) - expected)
    if missing or extra:
        raise CheckpointError(f"{where}: missing keys {missing}, unknown keys {extra}")

"""What a packed transformer is: one format per kind of layer, the layers that have it, and the inputs they share.

The scheme is the part of `config.json` that the runtime reads. How the file was made (the recipe) is provenance only.
docs/format.md is the prose twin of this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.attention import RULES as ATTENTION_RULES
from ditq_runtime.format.attention import AttentionFormat
from ditq_runtime.format.layer import RULES as LAYER_RULES
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.rules import Rule, check_record
from ditq_runtime.format.site import SiteFormat

SHIFT_OF = {
    "diffusers": 1,
    "dit": 0,
}  # timestep_freq -> `downscale_freq_shift` of diffusers' Timesteps
RULES = {
    "architecture": Rule(str),
    "shared_embedder": Rule(bool),
    "formats": Rule(dict),
    "layers": Rule(dict, items=str),
    "sites": Rule(dict),
    "timestep": Rule(str),
    "timestep_freq": Rule(str, tuple(SHIFT_OF)),
    "attention": Rule(dict, optional=True),
}


@dataclass(frozen=True)
class Scheme:
    """Which layers of which architecture have which format.

    Attributes:
        architecture: the diffusers class name of the transformer.
        shared_embedder: the timestep and label embedder is stored once, in the first block.
        formats: name -> LayerFormat.
        layers: module name -> name of its format.
        sites: `BLOCK.SITE` -> SiteFormat; every layer with quantized activations reads exactly one.
        timestep: name of the argument of the model's forward that timestep groups go by.
        timestep_freq: `diffusers` or `dit`, how a DiT embeds its timestep (`ditq_runtime.layers.timestep_freq`).
        attention: name of an attention module -> its format; those that are absent stay float.
    """

    architecture: str
    shared_embedder: bool
    formats: dict[str, LayerFormat]
    layers: dict[str, str]
    sites: dict[str, SiteFormat] = field(default_factory=dict)
    timestep: str = "timestep"
    timestep_freq: str = "diffusers"
    attention: dict[str, AttentionFormat] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        architecture: str,
        shared_embedder: bool,
        layers: Mapping[str, LayerFormat],
        sites: Mapping[str, SiteFormat],
        attention: Mapping[str, AttentionFormat] | None = None,
    ) -> Scheme:
        """A scheme from the format of every layer and site, and of every attention that is quantized."""
        formats = {layer_format.name: layer_format for layer_format in layers.values()}
        names = {layer: layer_format.name for layer, layer_format in layers.items()}
        return cls(
            architecture, shared_embedder, formats, names, dict(sites),
            attention=dict(attention or {}),
        )  # fmt: skip

    def format_of(self, layer: str) -> LayerFormat:
        """The format of a module that the scheme lists."""
        return self.formats[self.layers[layer]]

    def sites_of(self, block: str) -> dict[str, SiteFormat]:
        """The sites of a block: name inside the block -> format."""
        split = (name.rpartition(".") for name in self.sites)
        return {site: self.sites[f"{owner}.{site}"] for owner, _, site in split if owner == block}

    def to_dict(self) -> dict[str, Any]:
        """As stored in `config.json`; without quantized attention, no word of it."""
        stored = asdict(self)
        stored["sites"] = {name: site.to_dict() for name, site in self.sites.items()}
        if not self.attention:
            del stored["attention"]
        return stored

    @classmethod
    def from_dict(cls, stored: Any) -> Scheme:
        """Read a stored scheme; CheckpointError for anything unknown, missing or contradictory."""
        found = check_record(stored, RULES, "scheme")
        scheme = cls(
            architecture=found["architecture"],
            shared_embedder=found["shared_embedder"],
            formats=read_formats(found["formats"], found["layers"]),
            layers=dict(found["layers"]),
            sites={
                name: SiteFormat.from_dict(entry, f"scheme.sites.{name}")
                for name, entry in found["sites"].items()
            },
            timestep=found["timestep"],
            timestep_freq=found["timestep_freq"],
            attention=read_attention(found.get("attention", {})),
        )
        scheme.check_sites()
        return scheme

    def check_sites(self) -> None:
        """CheckpointError unless every layer with quantized activations reads one site, quantized as it is."""
        homes: dict[str, str] = {}
        for name, site in self.sites.items():
            block = name.rpartition(".")[0]
            for reader in site.readers:
                if reader not in self.layers or not block or not reader.startswith(f"{block}."):
                    raise CheckpointError(
                        f"scheme: site {name} is read by {reader}, which is no layer of its block"
                    )
                if homes.setdefault(reader, name) != name:
                    raise CheckpointError(
                        f"scheme: {reader} reads two sites, {homes[reader]} and {name}"
                    )
        for name, site in self.sites.items():
            read = {self.format_of(reader).activations for reader in site.readers} - {"none"}
            if read != {site.activations} - {"none"}:
                raise CheckpointError(
                    f"scheme: site {name} has {site.activations} activations, its readers {sorted(read)}"
                )
        for layer, format_name in self.layers.items():
            if self.formats[format_name].integer_gemm and layer not in homes:
                raise CheckpointError(
                    f"scheme: {layer} has quantized activations and reads no site"
                )


def read_formats(formats: dict[str, Any], layers: Mapping[str, str]) -> dict[str, LayerFormat]:
    """The formats of a scheme; CheckpointError for a damaged one, or layers without."""
    found = {}
    for name, entry in formats.items():
        found[name] = LayerFormat(**check_record(entry, LAYER_RULES, f"scheme.formats.{name}"))
    check_defined(layers.values(), found)
    return found


def check_defined(named: Iterable[str], formats: Mapping[str, Any]) -> None:
    """CheckpointError for layers of no format, or no layers."""
    names = set(named)
    unknown = sorted(names - formats.keys())
    if unknown:
        raise CheckpointError(f"scheme: layers name formats that are not defined: {unknown}")
    if not names:
        raise CheckpointError("scheme: no layer is listed, so nothing would be quantized")


def read_attention(stored: dict[str, Any]) -> dict[str, AttentionFormat]:
    """The attention formats of a scheme; CheckpointError for a damaged one."""
    return {
        module: AttentionFormat(
            **check_record(entry, ATTENTION_RULES, f"scheme.attention.{module}")
        )
        for module, entry in stored.items()
    }

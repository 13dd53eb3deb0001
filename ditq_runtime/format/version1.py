"""Format version 1, translated as it loads: what linears share stood with each of them, folds beside the block.

docs/format.md describes it in an appendix. Nothing writes it any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format import layer, scheme
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.rules import Rule, check_record, check_value
from ditq_runtime.format.safetensors_header import TensorInfo
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.format.site import SITES

VERSION = 1
RULES = {
    **{name: rule for name, rule in scheme.RULES.items() if name not in ("sites", "timestep")},
    "folds": Rule(dict, items=int),
}
LAYER_RULES = {**layer.RULES, "smooth": Rule(bool)}
COUNT = Rule(int, least=0)
FOLDS = ".folds."
FOLD_FIELDS = {"scale": "scale", "shift": "fold_shift"}
SITE_FIELDS = ("act_scale", "act_zero", "smooth_inv")  # of every reader


@dataclass(frozen=True)
class Version1:
    """A scheme of version 1.

    Attributes:
        stored: its dictionary.
        scheme: as far as it needs no model: without sites.
        smooth: layers whose quantizer multiplies by a factor.
        folds: `BLOCK.SITE` -> number of shifts of a site that a producer absorbed; 0: a factor alone.
    """

    stored: dict[str, Any]
    scheme: Scheme
    smooth: frozenset[str]
    folds: dict[str, int]

    @classmethod
    def read(cls, stored: Any) -> Version1:
        """Read a stored scheme; CheckpointError for anything unknown, missing or contradictory."""
        found = check_record(stored, RULES, "scheme")
        for name, count in found["folds"].items():
            check_value(f"scheme: the number of shifts of {name}", count, COUNT)
        smooth, formats = set(), dict[str, LayerFormat]()
        for name, entry in found["formats"].items():
            fields = dict(check_record(entry, LAYER_RULES, f"scheme.formats.{name}"))
            if fields.pop("smooth"):
                smooth.add(name)
            formats[name] = LayerFormat(**fields)
            if name in smooth and not formats[name].integer_gemm:
                raise CheckpointError("format: smooth needs quantized activations")
        scheme.check_defined(found["layers"].values(), formats)
        told = Scheme(
            found["architecture"], found["shared_embedder"], formats, dict(found["layers"]),
            timestep_freq=found["timestep_freq"],
            attention=scheme.read_attention(found.get("attention", {})),
        )  # fmt: skip
        layers = frozenset(name for name, kind in told.layers.items() if kind in smooth)
        return cls(stored, told, layers, dict(found["folds"]))

    def site_shapes(self, homes: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
        """What of the sites' tensors was stored: new name -> shape, of which only the number of shifts is told.

        Args:
            homes: layer -> the `BLOCK.SITE` that it reads.

        Raises:
            CheckpointError: a fold of a site that there is not.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.smooth & homes.keys():
            shapes[f"{_prefix(homes[name])}.smooth_inv"] = (0,)
        for name, count in self.folds.items():
            if name not in homes.values():
                raise CheckpointError(
                    f"scheme: folds name a site {name!r}, which the model does not have"
                )
            shapes[f"{_prefix(name)}.scale"] = (0,)
            if count:
                shapes[f"{_prefix(name)}.fold_shift"] = (count, 0)
        return shapes

    def expected(self) -> Iterable[str]:
        """Old names of the site tensors that every reader must have."""
        for name in self.scheme.layers:
            if self.scheme.format_of(name).activations == "static":
                yield from (f"{name}.act_scale", f"{name}.act_zero")
            if name in self.smooth:
                yield f"{name}.smooth_inv"


@dataclass
class Renaming:
    """Tensors of a file of version 1 under their new names; what readers of a site share must be equal.

    Attributes:
        homes: layer -> the `BLOCK.SITE` that it reads.
        seen: new name -> the first tensor that came under it.
    """

    homes: Mapping[str, str]
    seen: dict[str, torch.Tensor] = field(default_factory=dict)

    def name(self, old: str) -> str:
        """The new name of a tensor."""
        block, inside, rest = old.partition(FOLDS)
        if inside:
            site, _, kind = rest.rpartition(".")
            return f"{block}.{SITES}.{site}.{FOLD_FIELDS.get(kind, kind)}"
        reader, _, kind = old.rpartition(".")
        if kind in SITE_FIELDS and reader in self.homes:
            return f"{_prefix(self.homes[reader])}.{kind}"
        return old

    def headers(
        self, found: Mapping[str, TensorInfo], expected: Iterable[str]
    ) -> dict[str, TensorInfo]:
        """Headers under new names.

        Raises:
            CheckpointError: a reader without the tensors of its site, or with others than another reader's.
        """
        for name in expected:
            if name not in found:
                raise CheckpointError(
                    f"{name}: missing from the checkpoint; it is incomplete, convert or copy it again"
                )
        renamed: dict[str, TensorInfo] = {}
        for old, info in found.items():
            first = renamed.setdefault(self.name(old), info)
            if (first.dtype, first.shape) != (info.dtype, info.shape):
                raise CheckpointError(_differs(old))
        return renamed

    def tensors(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of one shard under new names.

        Raises:
            CheckpointError: readers of one site disagree about it.
        """
        renamed: dict[str, torch.Tensor] = {}
        for old, tensor in state.items():
            new = self.name(old)
            if new != old and not torch.equal(self.seen.setdefault(new, tensor), tensor):
                raise CheckpointError(_differs(old))
            renamed[new] = tensor
        return renamed


def _prefix(site: str) -> str:
    block, _, name = site.rpartition(".")
    return f"{block}.{SITES}.{name}"


def _differs(name: str) -> str:
    return (
        f"{name}: differs from that of another linear which reads the same input; the checkpoint is damaged, or was "
        "changed by hand: convert the model again"
    )

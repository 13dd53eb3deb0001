"""What one class came to: a row of the table, which survives JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import log10
from pathlib import Path

import torch

from ditq_runtime.files import write_json

NAN = float("nan")


@dataclass
class Converted:
    """One recipe on one class.

    Attributes:
        integers: share of the block linears' parameters that are stored as integers.
        four_bits: share of them in four bits.
        error: relative error of the forwards against the float model; NaN if it did not come so far.
        failed: what went wrong; empty if nothing did.
    """

    integers: float = 0.0
    four_bits: float = 0.0
    error: float = NAN
    failed: str = ""


@dataclass
class Planted:
    """A model whose activations got salient channels, its function kept: what W8A8 makes of it.

    Attributes:
        sites: that were planted.
        linear: relative error without smoothing.
        smoothquant: with it.
        bf16: of the smoothed model in bf16, against the float model in fp32.
        float_bf16: of the float model in bf16, likewise.
        failed: what went wrong; empty if nothing did.
    """

    sites: int = 0
    linear: float = NAN
    smoothquant: float = NAN
    bf16: float = NAN
    float_bf16: float = NAN
    failed: str = ""

    @property
    def recovered(self) -> float:
        """What smoothing gains, in dB; NaN where nothing was planted."""
        return 20 * log10(self.linear / self.smoothquant) if self.sites else NAN

    @property
    def bf16_excess(self) -> float:
        """Error in bf16, in units of that in fp32 and the float model's own in bf16 together: no more than 1."""
        return self.bf16 / (self.smoothquant + self.float_bf16)


@dataclass
class Row:
    """One class.

    Attributes:
        name: of the class.
        commit: that it was measured at.
        calibrated: by the calls of a pipeline, which one, or by forwards of the model alone.
        blocks: repeated blocks.
        sites: inputs that linears share.
        shared: sites with several readers.
        kinds: producer -> sites.
        proof: largest relative error of all folds together in fp64.
        timestep: the argument that carries the timestep, or why there is none.
        kept: reason -> block linears that stay float.
        recipes: name -> what came of it.
        planted: the same model with salient channels.
        failed: what went wrong before any recipe.
    """

    name: str
    commit: str = ""
    calibrated: str = ""
    blocks: int = 0
    sites: int = 0
    shared: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    proof: float = NAN
    timestep: str = ""
    kept: dict[str, int] = field(default_factory=dict)
    recipes: dict[str, Converted] = field(default_factory=dict)
    planted: Planted = field(default_factory=Planted)
    failed: str = ""

    def write(self, path: Path) -> None:
        """Store it."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Row:
        """What was stored."""
        stored = json.loads(path.read_text(encoding="utf-8"))
        recipes = {name: Converted(**done) for name, done in stored.pop("recipes").items()}
        return cls(**{**stored, "recipes": recipes, "planted": Planted(**stored["planted"])})


def numbered(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under their numbers, as a file holds them."""
    return {str(i): tensor.contiguous().clone() for i, tensor in enumerate(tensors)}


def relative(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Root of the mean square error over the root of the mean square, of all outputs together."""
    error = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True)
    )
    size = sum(float(b.double().square().sum()) for b in theirs)
    return (error / size) ** 0.5


def told(error: Exception) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]

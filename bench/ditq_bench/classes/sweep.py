"""One class: discover, prove, calibrate, convert, save. Reads in the order it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ditq_bench.zoo import Tiny, outputs, quiet
from ditq_converters.calibrate.run import calibrate
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.story import convert
from ditq_converters.plan.recipe import Recipe
from ditq_converters.sites.find import Discovery, discover, family_for
from ditq_converters.sites.reasons import EMBEDDER
from ditq_runtime import QuantLinear
from ditq_runtime.families import Family, NormWeights, OnTheFly, ProductRows, ValueRows

HTG = {"method": "htg", "num_groups": 2, "attention": "none"}
RECIPES: dict[str, dict[str, Any]] = {
    "linear-w8": {"method": "linear", "weights": "w8"},
    "linear-w4p": {"method": "linear", "weights": "w4p"},
    "smoothquant-w8": {"method": "smoothquant", "weights": "w8"},
    "smoothquant-w8-static": {"method": "smoothquant", "weights": "w8", "activations": "static"},
    "smoothquant-w4p-gptq": {"method": "smoothquant", "weights": "w4p", "rounding": "gptq"},
    "htg-w8": {**HTG, "weights": "w8"},
    "htg-w8-static": {**HTG, "weights": "w8", "activations": "static"},
    "htg-w4p-gptq": {**HTG, "weights": "w4p", "rounding": "gptq"},
    "ditas-w8": {"method": "ditas", "weights": "w8", "lora_rank": 0},
    "ditas-w8-static": {
        "method": "ditas",
        "weights": "w8",
        "activations": "static",
        "lora_rank": 0,
    },
    "ditas-w4p-gptq": {"method": "ditas", "weights": "w4p", "rounding": "gptq", "lora_rank": 0},
}
STEPS = (1.0, 0.75, 0.5, 0.25)  # of the largest timestep, as a sampler falls
ROWS = 8  # kept per site and timestep
REFUSED = "follows the timestep, and"  # a class with several timesteps or none, told by name
OUTPUT_FILE, STATS = "output.safetensors", "stats"


@dataclass
class Converted:
    """One recipe on one class.

    Attributes:
        integers: share of the block linears' parameters that are stored as integers.
        four_bits: share of them in four bits.
        error: relative error of one forward against the float model; NaN if it did not come so far.
        failed: what went wrong; empty if nothing did.
    """

    integers: float = 0.0
    four_bits: float = 0.0
    error: float = float("nan")
    failed: str = ""


@dataclass
class Row:
    """One class.

    Attributes:
        name: of the class.
        blocks: repeated blocks.
        sites: inputs that linears share.
        shared: sites with several readers.
        kinds: producer -> sites.
        proof: largest relative error of all folds together in fp64.
        timestep: the argument that carries the timestep, or why there is none.
        kept: reason -> block linears that stay float.
        recipes: name -> what came of it.
        failed: what went wrong before any recipe.
    """

    name: str
    blocks: int = 0
    sites: int = 0
    shared: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    proof: float = float("nan")
    timestep: str = ""
    kept: dict[str, int] = field(default_factory=dict)
    recipes: dict[str, Converted] = field(default_factory=dict)
    failed: str = ""


def sweep(tiny: Tiny, folder: Path, recipes: Sequence[str] = ()) -> Row:
    """One class through all recipes; what fails is told in its row.

    Args:
        tiny: of the zoo.
        recipes: names of `RECIPES`; all by default.
        folder: each recipe's checkpoint goes to a folder of its name, with the output of a forward.
    """
    row = Row(tiny.name)
    try:
        with quiet():
            model = tiny.build()
            inputs = tiny.inputs(model)
            found = discover(model, inputs)
            fill(row, found, model)
            family_for(model, inputs)
            stats = observe(tiny, model, inputs, folder / STATS)
    except Exception as error:
        row.failed = told(error)
        return row
    for name in recipes or RECIPES:
        out = folder / name
        row.recipes[name] = one_recipe(model, inputs, found.family, stats, RECIPES[name], out)
    return row


def observe(tiny: Tiny, model: nn.Module, inputs: dict[str, Any], folder: Path) -> CalibrationStats:
    """Statistics of a few forwards at falling timesteps."""
    names = (tiny.timestep,) if isinstance(tiny.timestep, str) else tiny.timestep or ()

    def run(model: nn.Module) -> None:
        for share in STEPS:
            times = {name: (inputs[name] * share).to(inputs[name].dtype) for name in names}
            with quiet():
                model(**{**inputs, **times})

    return calibrate(model, folder, run=run, rows=ROWS * len(STEPS), attention=False, quiet=True)


def fill(row: Row, found: Discovery, model: nn.Module) -> None:
    """What discovery says about a class."""
    tables = found.family.block_tables(model)
    sites = [site for table in tables.values() for site in table.sites]
    row.blocks, row.sites, row.proof = len(tables), len(sites), found.error
    row.shared = sum(len(site.consumers) > 1 for site in sites)
    row.kinds = dict(Counter(KINDS[type(site.producer)] for site in sites))
    row.timestep = found.family.timestep_argument or found.family.why_no_timestep
    inside = tuple(f"{block}." for block in tables)
    row.kept = dict(Counter(why for n, why in found.family.kept.items() if n.startswith(inside)))


KINDS = {NormWeights: "norm", ValueRows: "value", ProductRows: "product", OnTheFly: "quantizer"}


@torch.no_grad()
def one_recipe(
    model: nn.Module,
    inputs: dict[str, Any],
    family: Family,
    stats: CalibrationStats,
    choices: dict[str, Any],
    out: Path,
) -> Converted:
    """Convert, save, and run once, for a new process to do the same."""
    done = Converted()
    try:
        with quiet(), torch.compiler.set_stance("force_eager"):  # some compile flex attention
            packed = convert(model, Recipe.of(**choices), stats, out, quiet=True)
            done.integers, done.four_bits = shares(model, packed, family)
            truth, got = outputs(model, inputs), outputs(packed, inputs)
        save_file(numbered(got), out / OUTPUT_FILE)
        done.error = relative(got, truth)
    except Exception as error:
        done.failed = told(error)
    return done


def shares(model: nn.Module, packed: nn.Module, family: Family) -> tuple[float, float]:
    """Of the parameters of linears and experts in the blocks: how many are integers, and how many have four bits.

    Embedders that stand in every block (DiT) see one row per sample and do not count.
    """
    total, integer, four = 0, 0, 0
    packed_layers = dict(packed.named_modules())
    for name, parameters in block_parameters(model, family):
        layer = packed_layers.get(name)
        total += parameters
        if isinstance(layer, QuantLinear) and layer.format.weights != "fp32":
            integer += parameters
            four += parameters * layer.format.weights.startswith("w4")
    return integer / total, four / total


def block_parameters(model: nn.Module, family: Family) -> Iterator[tuple[str, int]]:
    """(name, parameters) of every linear and every experts' tensor in the blocks, embedders left out."""
    inside = tuple(f"{block}." for block in family.block_tables(model))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        if name.startswith(inside) and family.kept.get(name) != EMBEDDER:
            yield name, sum(p.numel() for p in linear.parameters())
    for name in family.kept:
        if name not in linears and name.startswith(inside):
            yield name, model.get_parameter(name).numel()


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

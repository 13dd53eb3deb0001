"""One class: discover, prove, calibrate, convert, save. Reads in the order it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ditq_bench.classes.parameters import shares
from ditq_bench.classes.planted import planted
from ditq_bench.classes.recipes import RECIPES
from ditq_bench.classes.row import Converted, Row, numbered, relative, told
from ditq_bench.classes.subject import Subject, make, run_all
from ditq_bench.zoo import Tiny, quiet
from ditq_converters.convert.story import convert
from ditq_converters.plan.recipe import Recipe
from ditq_converters.sites.find import Discovery
from ditq_runtime.families import NormWeights, OnTheFly, ProductRows, ValueRows

OUTPUT_FILE, STATS, PLANTED = "output.safetensors", "stats", "planted"
KINDS = {NormWeights: "norm", ValueRows: "value", ProductRows: "product", OnTheFly: "quantizer"}


def sweep(tiny: Tiny, folder: Path, recipes: Sequence[str] = (), salient: bool = True) -> Row:
    """One class through all recipes; what fails is told in its row.

    Args:
        tiny: of the zoo.
        folder: each recipe's checkpoint goes to a folder of its name, with the output of its forwards.
        recipes: names of `RECIPES`; all by default.
        salient: also plant salient channels and see what smoothing makes of them.
    """
    row = Row(tiny.name)
    try:
        subject = make(tiny, folder / STATS)
        fill(row, subject.found, subject.model)
    except Exception as error:
        row.failed = told(error)
        return row
    row.calibrated = subject.calibrated
    for name in recipes or RECIPES:
        row.recipes[name] = one_recipe(subject, RECIPES[name], folder / name)
    if salient:
        row.planted = planted(subject, folder / PLANTED)
    return row


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


@torch.no_grad()
def one_recipe(subject: Subject, choices: dict[str, Any], out: Path) -> Converted:
    """Convert, save, and run, for a new process to do the same."""
    done, model = Converted(), subject.model
    try:
        with quiet(), torch.compiler.set_stance("force_eager"):  # some compile flex attention
            packed = convert(model, Recipe.of(**choices), subject.stats, out, quiet=True)
            done.integers, done.four_bits = shares(model, packed, subject.found.family)
            truth, got = run_all(model, subject.calls), run_all(packed, subject.calls)
        save_file(numbered(got), out / OUTPUT_FILE)
        done.error = relative(got, truth)
    except Exception as error:
        done.failed = told(error)
    return done

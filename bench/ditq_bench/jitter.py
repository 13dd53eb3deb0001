"""How much of a difference between two methods is the luck of rounding: repeat each with perturbed smoothing factors.

A factor that is off by a few percent is as good a factor, but it moves every 4-bit code near a boundary: the spread
over seeds is what a comparison of two conversions cannot resolve.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ditq_bench.methods import ABLATIONS, Subject, prepare, read_rows
from ditq_bench.results import commit
from ditq_converters.convert.story import convert
from ditq_converters.evaluate import forced_sqnr
from ditq_converters.methods import METHODS, BlockTransform, SiteData, Transform
from ditq_converters.plan.recipe import Recipe
from ditq_runtime.files import atomic_file
from ditq_runtime.version import __version__

CASES = (
    "ptq4dit: CSB, middle call",
    "ptq4dit: CSB + SSC",
    "ditas: TAS",
    "ditas: TAS + grid",
    "bias correction: ditas: TAS",
    "bias correction: ditas: TAS + grid",
)
MODELS = ("demo:digits-salient", "demo:digits-asymmetric")
AMOUNT = 0.05  # standard deviation of the logarithm of the factor
SEEDS = 4
CALLS = slice(2, None, 5)  # of 50: every fifth
FIELDS = (
    "model",
    "case",
    "as_it_is_db",
    "mean_db",
    "deviation_db",
    "seeds",
    "amount",
    "ditq",
    "commit",
)


@contextmanager
def perturbed(method: str, amount: float, seed: int) -> Iterator[str]:
    """The name of a method like `method` whose factors are off by exp(amount * Gaussian), while the block lasts."""
    original, generator = METHODS[method], torch.Generator().manual_seed(seed)

    def transform(sites: Sequence[SiteData], options: Any) -> BlockTransform:
        assert original.transform is not None
        choice = original.transform(sites, options)
        return replace(choice, sites={name: _off(t) for name, t in choice.sites.items()})

    def _off(transform: Transform) -> Transform:
        if transform.smooth is None:
            return transform
        noise = torch.randn(transform.smooth.shape, generator=generator, dtype=torch.float64)
        return replace(transform, smooth=transform.smooth * torch.exp(amount * noise))

    name = f"{method} perturbed"
    METHODS[name] = replace(original, name=name, transform=transform)
    try:
        yield name
    finally:
        del METHODS[name]


def forced(recipe: Recipe, subject: Subject) -> float:
    """Forced SQNR in dB, over every fifth call."""
    baseline = subject.baseline
    packed = convert(baseline.pipe, recipe, subject.stats, quiet=True)
    calls = [made[CALLS] for made in baseline.run.calls]
    return forced_sqnr(calls, {"transformer": packed}).mean


def study(out: Path, models: Sequence[str] = MODELS) -> Iterator[dict[str, Any]]:
    """One row of FIELDS per model and case that `out`/jitter.csv does not hold yet, each also appended to it."""
    rows = read_rows(out / "jitter.csv")
    have = {(row["model"], row["case"]) for row in rows}
    for model in models:
        todo = [case for case in CASES if (model, case) not in have]
        subject = prepare(model, out / "stats") if todo else None
        for case in todo:
            assert subject is not None
            fields = {"weights": "w4p", "activations": "static", "modulation": "w8"}
            recipe = Recipe(**{**fields, **ABLATIONS[case]})
            found = []
            for seed in range(SEEDS):
                with perturbed(recipe.method, AMOUNT, seed) as name:
                    found.append(forced(replace(recipe, method=name), subject))
            figures = (forced(recipe, subject), statistics.mean(found), statistics.stdev(found))
            shown = (f"{figure:.2f}" for figure in figures)
            rows.append(
                dict(
                    zip(
                        FIELDS,
                        (model, case, *shown, SEEDS, AMOUNT, __version__, commit()),
                        strict=True,
                    )
                )
            )
            _write(out / "jitter.csv", rows)
            yield rows[-1]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)

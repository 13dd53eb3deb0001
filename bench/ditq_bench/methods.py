"""Compare the methods on the demo models: every one, in integers, and the ablations of their papers."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ditq_bench.results import commit
from ditq_bench.simulated import simulate
from ditq_bench.simulated.profiles import PROFILES
from ditq_converters.calibrate.run import calibrate
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.story import convert
from ditq_converters.evaluate import compare_runs, forced_sqnr, run
from ditq_converters.evaluate.paired import pooled_psnr_db
from ditq_converters.evaluate.scores import score_digits
from ditq_converters.models.open import open_model
from ditq_converters.plan.recipe import Recipe
from ditq_converters.showcase.asking import asked_for, digits
from ditq_converters.showcase.score import Baseline
from ditq_runtime.calls.pipeline import with_transformers
from ditq_runtime.files import atomic_file
from ditq_runtime.format.folder import open_folder
from ditq_runtime.version import __version__

MODELS = ("demo:digits", "demo:digits-salient", "demo:digits-asymmetric")
FLOWS = ("demo:digits-flow", "demo:digits-flow-salient", "demo:digits-flow-asymmetric")
FLOW_METHODS = ("linear", "smoothquant", "osplus", "ditas", "ptq4dit", "htg")
FED_BACK: dict[str, Any] = {"rounding": "gptq", "bias_correction": True}
NEAREST: dict[str, Any] = {}
ABLATED = ("demo:digits-salient", "demo:digits-asymmetric")
METHOD_NAMES = ("linear", "smoothquant", "osplus", "meta", "ditas", "ptq4dit", "htg")
FIELDS = (
    "model", "table", "case", "weights", "activations", "sqnr_free_db", "sqnr_forced_db", "psnr_db", "accuracy",
    "bytes", "convert_seconds", "samples", "steps", "calibration_samples",
    "ditq", "commit",
)  # fmt: skip
STEPS, SAMPLES, CALIBRATION_SAMPLES, GUIDANCE, SEED = 50, 10, 32, 1.5, 0

ABLATIONS: dict[str, dict[str, Any]] = {
    "htg: none": {"method": "linear"},
    "htg: shift only": {"method": "htg", "scale": False},
    "htg: scale only": {"method": "htg", "shift": False},
    "htg: both": {"method": "htg"},
    "htg: 1 group": {"method": "htg", "num_groups": 1},
    "htg: 10 groups": {"method": "htg", "num_groups": 10},
    "htg: 50 groups": {"method": "htg", "num_groups": 50},
    "htg: exact_dp": {"method": "htg", "linkage": "exact_dp"},
    "htg: EMA 0.9": {"method": "htg", "ema": 0.9},
    "htg: EMA 0.999": {"method": "htg", "ema": 0.999},
    "ptq4dit: none": {"method": "linear"},
    "ptq4dit: CSB, middle call": {"method": "ptq4dit", "ssc": False},
    "ptq4dit: CSB + SSC": {"method": "ptq4dit"},
    "ptq4dit: CSB, middle call, W8A8": {"method": "ptq4dit", "ssc": False, "weights": "w8"},
    "ptq4dit: CSB + SSC, W8A8": {"method": "ptq4dit", "weights": "w8"},
    "ditas: none": {"method": "linear"},
    "ditas: TAS": {"method": "ditas", "search": False, "lora_rank": 0},
    "ditas: TAS + grid": {"method": "ditas", "lora_rank": 0},
    "ditas: TAS + branch of 32": {"method": "ditas", "search": False, "lora_rank": 32},
    "ditas: TAS + grid + branch of 8": {"method": "ditas", "lora_rank": 8},
    "ditas: TAS + grid + branch of 32": {"method": "ditas", "lora_rank": 32},
    "meta: all calls, per channel": {"method": "linear", "group_size": 512},
    "meta: all calls, groups of 64": {"method": "linear"},
    "meta: 1 step, per channel": {"method": "meta", "group_size": 512},
    "meta: 1 step, groups of 64": {"method": "meta", "group_size": 64},
    "meta: 1 step, groups of 32": {"method": "meta", "group_size": 32},
    "rounding: smoothquant, nearest": {"method": "smoothquant"},
    "rounding: smoothquant, gptq": {"method": "smoothquant", "rounding": "gptq"},
    "rounding: htg, gptq": {"method": "htg", "rounding": "gptq"},
    "rounding: ditas, gptq": {"method": "ditas", "rounding": "gptq"},
    "range: htg, qdiff_mse": {"method": "htg", "range_method": "qdiff_mse"},
    "range: htg, ptq4dit_pct": {"method": "htg", "range_method": "ptq4dit_pct"},
}
CORRECTED = (
    "ditas: TAS", "ditas: TAS + grid", "htg: both", "ptq4dit: CSB, middle call", "ptq4dit: CSB + SSC",
)  # fmt: skip
ABLATIONS |= {
    f"bias correction: {case}": {**ABLATIONS[case], "bias_correction": True} for case in CORRECTED
}


@dataclass(frozen=True)
class Case:
    """One conversion: which table it belongs to, what it is called, its recipe; the profile of a simulation."""

    model: str
    table: str
    name: str
    recipe: Recipe
    profile: str = ""


def cases(models: tuple[str, ...]) -> Iterator[Case]:
    """All methods x {W8A8, W4A8} x {static, token}; on the planted models the ablations at W4A8 static.

    Attention stays float: the study compares what methods do to linears. The ablations keep the modulation linears at
    8 bits: at 4 they add an error of their own to all.
    """
    for model in models:
        for weights in ("w8", "w4p"):
            for activations in ("static", "token"):
                for name in METHOD_NAMES:
                    recipe = Recipe(name, weights, activations, attention="none")
                    yield Case(model, "methods", name, recipe)
        for name, fields in ABLATIONS.items() if model in ABLATED else ():
            common = {"weights": "w4p", "activations": "static", "modulation": "w8"}
            recipe = Recipe(**{**common, "attention": "none", **fields})
            yield Case(model, "ablations", name, recipe)


def flow_cases(models: tuple[str, ...]) -> Iterator[Case]:
    """All methods x {W8A8, W4A8, W4A8 with gptq and bias correction}, per token; linear W4A8 needs no data."""
    for model in models:
        for table, weights, more in (
            ("methods", "w8", NEAREST), ("methods", "w4p", NEAREST), ("fed back", "w4p", FED_BACK),
        ):  # fmt: skip
            for name in FLOW_METHODS:
                recipe = Recipe(name, weights, "token", attention="none", **more)
                yield Case(model, table, name, recipe)


def profile_cases(models: tuple[str, ...], methods: tuple[str, ...]) -> Iterator[Case]:
    """The published quantizers of these methods, simulated in float, at 8 and 4 bits."""
    for model in models:
        for weights in ("w8", "w4p"):
            for method, profile in PROFILES:
                if method in methods:
                    name = f"{method} {profile}, simulated"
                    yield Case(model, "profiles", name, Recipe(method, weights), profile)


@dataclass(frozen=True)
class Subject:
    """A float model, its calibration and its own run."""

    stats: CalibrationStats
    baseline: Baseline


def prepare(model: str, folder: Path) -> Subject:
    """Calibrate a model (resumable) and sample it in float."""
    pipe = open_model(model)
    how: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE}
    labels = digits(CALIBRATION_SAMPLES, SEED)
    asked = asked_for(pipe, labels, CALIBRATION_SAMPLES, SEED, **how)
    stats = calibrate(pipe, folder / model.partition(":")[2], **asked)
    return Subject(stats, Baseline.of(model, pipe, SAMPLES, SAMPLES, SEED + 1, **how))


def measure(case: Case, subject: Subject) -> dict[str, Any]:
    """Convert (or simulate, where a profile is to be), sample, compare: one row of FIELDS."""
    begin, baseline = time.perf_counter(), subject.baseline
    nbytes: int | str = ""  # a simulation has no size of its own
    if case.profile:
        packed = simulate(baseline.pipe, case.recipe, case.profile, subject.stats)
        seconds = time.perf_counter() - begin
    else:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            packed = convert(baseline.pipe, case.recipe, subject.stats, out, quiet=True)
            seconds = time.perf_counter() - begin
            nbytes = open_folder(out).nbytes
    twin = {"transformer": packed}
    own = run(with_transformers(baseline.pipe, twin), baseline.inputs, decode=True)
    assert own.images is not None
    forced = forced_sqnr(baseline.run.calls, twin)
    return {
        "model": case.model,
        "table": case.table,
        "case": case.name,
        "weights": case.recipe.weights,
        "activations": case.recipe.activations,
        "sqnr_free_db": f"{compare_runs(baseline.run, own).mean:.2f}",
        "sqnr_forced_db": f"{forced.mean:.2f}",
        "psnr_db": f"{pooled_psnr_db(baseline.images, own.images):.2f}",
        "accuracy": f"{score_digits(own.images, baseline.labels)['accuracy']:.3f}",
        "bytes": nbytes,
        "convert_seconds": f"{seconds:.1f}",
        "samples": SAMPLES,
        "steps": baseline.inputs[0].steps(baseline.pipe),
        "calibration_samples": CALIBRATION_SAMPLES,
        "ditq": __version__,
        "commit": commit(),
    }


def study(
    out: Path, studied: Iterable[Case], table: str = "methods.csv"
) -> Iterator[tuple[int, int]]:
    """Measure every case that `out`/`table` does not hold yet; yields (done, total) after each."""
    path = out / table
    rows = read_rows(path)
    have = {_key(row) for row in rows}
    todo = list(studied)
    subject, of = None, ""
    for number, case in enumerate(todo, 1):
        wanted = (case.model, case.table, case.name, case.recipe.weights, case.recipe.activations)
        if wanted not in have:
            if subject is None or of != case.model:
                subject, of = prepare(case.model, out / "stats"), case.model
            rows.append(measure(case, subject))
            write_rows(path, rows)
        yield number, len(todo)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run; none if there was none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows, atomically."""
    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[field] for field in FIELDS[:5])

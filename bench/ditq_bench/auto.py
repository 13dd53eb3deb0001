"""What `auto` reaches on the demo models at several budgets, beside the defaults and single methods at equal bytes.

    ditq bench auto --out runs/auto

Every row is converted, written, loaded from its folder in fp32 and judged by forced SQNR, with guidance and without, at
noise that neither calibration nor search saw (other seeds). Bytes are those of the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from torch import nn

from ditq_bench.methods import GUIDANCE, SAMPLES, SEED, STEPS, read_rows
from ditq_bench.results import commit
from ditq_converters import CalibrationStats, Recipe, calibrate, convert, open_model
from ditq_converters.auto.budget import float_bytes, parse_budget
from ditq_converters.auto.search import Ladder, climb
from ditq_converters.evaluate.runs import Recorded
from ditq_converters.evaluate.sqnr import forced_sqnr, sqnr_db
from ditq_converters.plan.plan import Plan
from ditq_converters.showcase.score import Baseline
from ditq_runtime.files import atomic_file
from ditq_runtime.format.folder import open_folder
from ditq_runtime.version import __version__

MODELS = ("demo:digits", "demo:digits-salient", "demo:digits-asymmetric")
BUDGETS = ("smallest", "15%", "16.6%", "18%", "largest")
SINGLE: dict[str, dict[str, Any]] = {
    "default w8": {},
    "default w4p": {"weights": "w4p"},
    "smoothquant w4p, gptq": {"weights": "w4p", "rounding": "gptq", "bias_correction": True},
    "htg w4p, gptq": {
        "method": "htg", "weights": "w4p", "rounding": "gptq", "bias_correction": True,
        "attention": "none",
    },
    "ditas w4p": {"method": "ditas", "weights": "w4p"},
    "ptq4dit w8": {"method": "ptq4dit", "attention": "none"},
}  # fmt: skip
SAMPLES_TO_CALIBRATE = 8
FIELDS = (
    "model",
    "case",
    "seed",
    "sqnr_guided_db",
    "sqnr_forced_db",
    "bytes",
    "share",
    "ditq",
    "commit",
)


@dataclass(frozen=True)
class Subject:
    """A model with one calibration, and the float run that judges."""

    model: str
    seed: int
    stats: CalibrationStats
    baseline: Baseline


def study(
    out: Path, models: Iterable[str], seeds: int, budgets: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """Measure every row that `out`/auto.csv does not hold yet, and add it."""
    path = out / "auto.csv"
    rows = read_rows(path)
    have = {(row["model"], row["case"], int(row["seed"])) for row in rows}
    for model in models:
        for seed in range(seeds):
            asked = [f"auto {budget}" for budget in budgets] + list(SINGLE)
            missing = [case for case in asked if (model, case, seed) not in have]
            if not missing:
                continue
            subject = prepare(out, model, seed)
            ladder: Ladder | None = None
            for case in missing:
                choice: Plan | Recipe
                if case in SINGLE:
                    choice = Recipe(**SINGLE[case])
                else:
                    ladder = ladder or climb(subject.baseline.pipe, subject.stats)
                    most = parse_budget(case.partition(" ")[2], subject.baseline.pipe.transformer)
                    choice = ladder.plan(most)
                rows.append(measure(subject, case, choice))
                _write(path, rows)
                yield rows[-1]


def prepare(out: Path, model: str, seed: int) -> Subject:
    """Calibrate with one seed; sample the float model that judges with another, once for all seeds."""
    pipe = open_model(model)
    how: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE}
    folder = out / "stats" / f"{model.partition(':')[2]}-{seed}"
    size = SAMPLES_TO_CALIBRATE
    stats = calibrate(pipe, folder, samples=size, batch=size, seed=SEED + 10 + seed, **how)
    return Subject(model, seed, stats, Baseline.of(model, pipe, SAMPLES, SAMPLES, SEED + 1, **how))


def measure(subject: Subject, case: str, choice: Plan | Recipe) -> dict[str, Any]:
    """One row of FIELDS."""
    pipe = subject.baseline.pipe
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        convert(pipe, choice, subject.stats, out, quiet=True)
        nbytes = open_folder(out).nbytes
        kind = getattr(diffusers, type(pipe.transformer).__name__)
        packed = kind.from_pretrained(out / "transformer", torch_dtype=torch.float32)
        forced = forced_sqnr(subject.baseline.run.calls, {"transformer": packed})
        guided = guided_db(subject.baseline.run.calls, packed)
    return {
        "model": subject.model,
        "case": case,
        "seed": subject.seed,
        "sqnr_guided_db": f"{guided:.2f}",
        "sqnr_forced_db": f"{forced.mean:.2f}",
        "bytes": nbytes,
        "share": f"{nbytes / float_bytes(pipe.transformer):.4f}",
        "ditq": __version__,
        "commit": commit(),
    }


@torch.no_grad()
def guided_db(calls: Sequence[Sequence[Recorded]], packed: nn.Module) -> float:
    """Forced SQNR of what the scheduler is given, null + w (cond - null), mean over calls in dB (Meta, Eq. 3).

    Args:
        calls: of a DiT pipeline, each a batch of [conditional; null].
        packed: the quantized transformer.
    """

    def guide(output: torch.Tensor) -> torch.Tensor:
        cond, null = output.chunk(2)
        return null + GUIDANCE * (cond - null)

    made = [one for recorded in calls for one in recorded]
    curve = [
        sqnr_db(guide(one.output), guide(one.call.replay(packed).float().cpu()))[0] for one in made
    ]
    return sum(curve) / len(curve)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [",".join(FIELDS), *(",".join(str(row[name]) for name in FIELDS) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")

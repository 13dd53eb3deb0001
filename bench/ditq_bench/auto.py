"""What `auto` reaches on the demo models at several budgets, beside single methods.

    ditq bench auto --out runs/auto

Every row is converted, written, loaded from its folder in fp32 and judged by the calls of a float run that neither
calibration nor search saw: of other seeds, and of other digits. It is calibrated on the even digits and judged on the
odd ones. Noise and calls that judge are held out. A DiT's class embeddings are among its weights, and rounding uses
all of them; in cases that begin with `hidden` those are taken out of the model meanwhile
(`hidden`), so that labels are held out as well. Bytes are those of the weight files.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ditq_bench.auto_cases import BUDGETS, ENDS, FLOATS, FLOWS, cases_of
from ditq_bench.hidden import HIDDEN, hide, reveal
from ditq_bench.methods import GUIDANCE, read_rows
from ditq_bench.results import commit
from ditq_converters import CalibrationStats, Recipe, calibrate, convert, open_model
from ditq_converters.auto.budget import float_bytes, parse_budget
from ditq_converters.auto.search import auto_plan, climb
from ditq_converters.demo.classifier import score
from ditq_converters.demo.drawing import call_arguments
from ditq_converters.evaluate.runs import Recorded, Run, run
from ditq_converters.evaluate.sqnr import compare_runs, sqnr_db
from ditq_converters.plan.file import read_plan, write_plan
from ditq_converters.plan.plan import Plan
from ditq_runtime.calls.inputs import Input, gather
from ditq_runtime.calls.pipeline import with_transformers
from ditq_runtime.files import atomic_file
from ditq_runtime.format.folder import open_folder
from ditq_runtime.version import __version__

CALIBRATED, JUDGED = (0, 2, 4, 6, 8), (1, 3, 5, 7, 9)  # digits
EACH = 2  # samples of each digit
STEPS = {False: 50, True: 20}  # of a DiT, of a flow
JUDGE_SEED = 1000
FIELDS = (
    "model", "case", "repeat", "sqnr_guided_db", "sqnr_forced_db", "sqnr_free_db", "accuracy", "bytes", "share",
    "cpu_seconds", "ditq", "commit",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model with one calibration, and the float run that judges.

    Attributes:
        model: of MODELS.
        pipe: what is converted.
        repeat: which calibration.
        stats: of it.
        inputs: that judge.
        judge: the float model's run of them.
        were: embeddings of the judged classes, where `pipe` does not know them.
    """

    model: str
    pipe: Any
    repeat: int
    stats: CalibrationStats
    inputs: list[Input]
    judge: Run
    were: torch.Tensor | None = None


def study(
    out: Path, models: Iterable[str], repeats: int, patterns: Sequence[str] = ("*",)
) -> Iterator[dict[str, Any]]:
    """Measure every row that `out`/auto.csv does not hold yet, and add it; one calibration after another.

    Args:
        out: folder of the rows, the statistics and the plans.
        models: of MODELS.
        repeats: calibrations of each.
        patterns: globs of cases.
    """
    path = out / "auto.csv"
    rows = read_rows(path)
    have = {(row["model"], row["case"], int(row["repeat"])) for row in rows}
    for repeat, model in ((repeat, model) for repeat in range(repeats) for model in models):
        asked = [case for case in cases_of(model) if any(fnmatch(case, p) for p in patterns)]
        missing = [case for case in asked if (model, case, repeat) not in have]
        for hides in (False, True):
            cases = [case for case in missing if case.startswith(HIDDEN) == hides]
            subject = prepare(out, model, repeat, hides) if cases else None
            for case in cases:
                assert subject is not None
                rows.append(measure(subject, case, choice_of(out, subject, case)))
                _write(path, rows)
                yield rows[-1]


def prepare(out: Path, model: str, repeat: int, hides: bool = False) -> Subject:
    """Calibrate with seeds of the repeat; sample the float model that judges, alike for all repeats.

    Args:
        out: folder of the statistics.
        model: of MODELS.
        repeat: number of the calibration.
        hides: the judged classes before it.
    """
    pipe, steps = open_model(model), STEPS[model in FLOWS]

    def entries(digits: Sequence[int], seed: int) -> list[dict[str, Any]]:
        arguments = call_arguments(pipe, list(digits) * EACH, GUIDANCE)
        return [{**arguments, "num_inference_steps": steps, "seed": seed}]

    inputs = gather("bench auto", pipe, entries(JUDGED, JUDGE_SEED))
    judge = run(pipe, inputs, few=len(JUDGED) * EACH, decode=True)
    were = hide(pipe.transformer, JUDGED, CALIBRATED[0]) if hides else None
    folder = out / "stats" / f"{model.partition(':')[2]}-{repeat}{'-hidden' * hides}"
    stats = calibrate(pipe, folder, entries(CALIBRATED, repeat), seed=repeat, quiet=True)
    return Subject(model, pipe, repeat, stats, inputs, judge, were)


def choice_of(out: Path, subject: Subject, case: str) -> Plan | Recipe:
    """What a case converts with; plans of a search are kept, since it takes longer than a conversion."""
    chosen = cases_of(subject.model)[case]
    if isinstance(chosen, dict):
        return Recipe(**chosen)
    budget, _, number = chosen.partition(FLOATS)
    if budget in ENDS:
        sites = int(number or 0)
        return auto_plan(subject.pipe, subject.stats, budget, float_sites=sites, quiet=True)
    folder = out / "plans" / f"{subject.model.partition(':')[2]}-{subject.repeat}"
    if not (folder / f"{chosen}.json").exists():
        ladder = climb(subject.pipe, subject.stats, quiet=True)
        folder.mkdir(parents=True, exist_ok=True)
        for budget in BUDGETS:
            most = parse_budget(budget, subject.pipe.transformer)
            write_plan(ladder.plan(most), folder / f"{budget}.json")
    return read_plan(folder / f"{chosen}.json")


def measure(subject: Subject, case: str, choice: Plan | Recipe) -> dict[str, Any]:
    """One row of FIELDS."""
    pipe, begin = subject.pipe, time.process_time()
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        convert(pipe, choice, subject.stats, out, quiet=True)
        seconds = time.process_time() - begin
        nbytes = open_folder(out).nbytes
        kind: Any = type(pipe.transformer)
        packed = kind.from_pretrained(out / "transformer", torch_dtype=torch.float32)
        if subject.were is not None:
            reveal(packed, JUDGED, subject.were)
        guided, forced = forced_db(subject.judge.calls, packed, subject.model in FLOWS)
        free, accuracy = free_run(subject, packed) if subject.model in FLOWS else ("", "")
    return {
        "model": subject.model,
        "case": case,
        "repeat": subject.repeat,
        "sqnr_guided_db": f"{guided:.2f}",
        "sqnr_forced_db": f"{forced:.2f}",
        "sqnr_free_db": free,
        "accuracy": accuracy,
        "bytes": nbytes,
        "share": f"{nbytes / float_bytes(pipe.transformer):.4f}",
        "cpu_seconds": f"{seconds:.1f}",
        "ditq": __version__,
        "commit": commit(),
    }


@torch.no_grad()
def forced_db(
    calls: Sequence[Sequence[Recorded]], packed: nn.Module, in_turn: bool
) -> tuple[float, float]:
    """Forced SQNR in dB, mean over calls: of the guided prediction, null + w (cond - null), and of all outputs.

    Args:
        calls: of the float run.
        packed: the quantized transformer.
        in_turn: the conditional call and the one without a prompt follow each other; otherwise one call has both.
    """
    made = [one for recorded in calls for one in recorded]
    pairs = [(one.output, one.call.replay(packed).float().cpu()) for one in made]
    forced = [sqnr_db(*pair)[0] for pair in pairs]
    if in_turn:  # [cond; null] as a DiT has it
        pairs = [
            (torch.cat([a, c]), torch.cat([b, d]))
            for (a, b), (c, d) in zip(pairs[::2], pairs[1::2], strict=True)
        ]
    guided = [sqnr_db(_guide(a), _guide(b))[0] for a, b in pairs]
    return sum(guided) / len(guided), sum(forced) / len(forced)


def free_run(subject: Subject, packed: nn.Module) -> tuple[str, str]:
    """SQNR in dB of the model on its own trajectory, and how many of its digits the classifier recognizes."""
    own = run(with_transformers(subject.pipe, {"transformer": packed}), subject.inputs, decode=True)
    assert own.images is not None
    right = score(own.images, torch.tensor(JUDGED * EACH)).accuracy
    return f"{compare_runs(subject.judge, own).mean:.2f}", f"{right:.3f}"


def _guide(output: torch.Tensor) -> torch.Tensor:
    cond, null = output.chunk(2)
    return null + GUIDANCE * (cond - null)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [",".join(FIELDS), *(",".join(str(row[name]) for name in FIELDS) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")

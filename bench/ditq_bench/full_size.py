"""A model of DiT-XL/2's size through the whole converter: seconds, peak memory and bytes of every stage.

    ditq bench full-size --out runs/xl

Builds the float pipeline with random weights, calibrates it, converts it in several ways, its weights on disk, loads
each result with diffusers and samples from it. Every stage is a process of its own, so that its peak memory is its own.
What is in OUT already is not made again: delete a folder there to time its stage anew. A killed conversion goes on
after its last block; its record says how many parts an earlier run had made, for its seconds are those of the rest.
"""

from __future__ import annotations

import cProfile
import multiprocessing
import os
import pstats
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditq_bench import full_size_report
from ditq_bench.results import commit
from ditq_converters.progress import Log
from ditq_converters.streaming import finished
from ditq_runtime.files import write_json

CALIBRATION_BUDGET = 6 * 2**30
CONVERSION_BUDGET = 2 * 2**30  # below the float model, so that it is converted block by block
AIMED_BUDGET = 6 * 2**30
STEPS, SAMPLES, ROWS = 2, 4, 16
LOG = "full_size.log"  # in OUT: stages, with times and an ETA
BLOCKS = 28
PARTS = {  # of a conversion: file and function -> what its time went into; no part but all holds another
    "story:convert": "all",
    "story:check_finite": "check for finite values",
    "stats:model_hash": "hash",
    "model:load": "read blocks",
    "fold:block_linears": "to fp64",
    "site_data:site_data": "read statistics",
    "fold:fold_block": "fold",
    "prefix:enter": "run up to blocks",
    "prefix:rows": "run blocks for what linears read",
    "prefix:leave": "run blocks to their end",
    "gptq:error_feedback": "error feedback",
    "target:best_damping": "choice of damping",
    "target:aimed": "targets",
    "weight_ranges:quantize_clipped": "scales and offsets",
    "gptq:compensated_codes": "codes",
    "bias_correction:corrected_bias": "bias correction",
    "finished:save": "keep blocks",
    "write:write_streamed": "write the folder",
}
VARIANTS = {
    f"{method}-{weights}": {"method": method, "weights": weights}
    for method in ("linear", "smoothquant")
    for weights in ("w8", "w4p")
} | {"smoothquant-w4p-g128": {"method": "smoothquant", "weights": "w4p", "group_size": 128}}
AUTO = "auto-w4p"  # what `convert --weights w4p` does


@dataclass(frozen=True)
class Stage:
    """One piece of work.

    Attributes:
        name: as in the report.
        work: runs it and returns figures of its own; a module-level function.
        arguments: of `work`.
        makes: the folder it writes; a stage whose folder is there is not run.
    """

    name: str
    work: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    makes: Path | None = None


def stages(out: Path, blocks: int = BLOCKS, samples: int = SAMPLES) -> list[Stage]:
    """All stages, in order."""
    from ditq_converters.auto.search import best

    model, stats = out / "float", out / "stats"
    found = [
        Stage("build", build_model, (model, blocks), model),
        Stage("calibrate", run_calibration, (model, stats, samples), stats),
    ]
    for name, recipe in {**VARIANTS, AUTO: best("w4p")}.items():
        packed, budget = out / name, AIMED_BUDGET if name == AUTO else CONVERSION_BUDGET
        work = (model, recipe, stats, packed, budget)
        found += [
            Stage(f"convert {name}", run_conversion, work, packed),
            Stage(f"load and sample {name}", load_and_sample, (packed,)),
        ]
    return found


def build_model(folder: Path, blocks: int = BLOCKS) -> dict[str, Any]:
    """Write the float pipeline, with so many blocks of DiT-XL/2's width."""
    from ditq_bench.xl_model import DIT_XL_2, build

    build(folder, {**DIT_XL_2, "num_layers": blocks})
    return {"bytes": _bytes(folder)}


def run_calibration(model: Path, stats: Path, samples: int = SAMPLES) -> dict[str, Any]:
    """Calibrate within CALIBRATION_BUDGET; a few calls are as large as many."""
    from ditq_converters import calibrate, open_model

    pipe = open_model(str(model), memory_budget=CALIBRATION_BUDGET)
    made = calibrate(
        pipe,
        stats,
        steps=STEPS,
        samples=samples,
        rows=ROWS,
        memory_budget=CALIBRATION_BUDGET,
    )
    return {
        "inputs": len(made.manifest["inputs"]),
        "model_calls": STEPS,
        "samples": samples,
        "memory_budget": CALIBRATION_BUDGET,
        "bytes": _bytes(stats),
    }


def run_conversion(
    model: Path, recipe: dict[str, Any], stats: Path, out: Path, budget: int = CONVERSION_BUDGET
) -> dict[str, Any]:
    """Convert with the weights on disk, even if they would fit into the budget; where its time went."""
    from ditq_converters import CalibrationStats, Recipe, convert
    from ditq_converters.streaming.opening import open_in_pieces
    from ditq_runtime.format.folder import open_folder
    from ditq_runtime.host.sizes import size_by_category

    opened = CalibrationStats.open(stats) if recipe["method"] != "linear" else None
    earlier = len(list(finished.folder_of(out).rglob("*.safetensors")))
    profile = cProfile.Profile(time.process_time)
    profile.runcall(convert, open_in_pieces(model, budget), Recipe(**recipe), opened, out)
    folder = open_folder(out)
    return {
        "memory_budget": budget,
        "earlier_parts": earlier,
        "transformer_bytes": folder.nbytes,
        "bytes_by_category": size_by_category(folder),
        "cpu_seconds_by_part": _parts(pstats.Stats(profile)),
    }


def load_and_sample(out: Path) -> dict[str, Any]:
    """Open a packed pipeline with diffusers and take one step; its pixels mean nothing."""
    import torch
    from diffusers import DiffusionPipeline

    import ditq_runtime

    begin = time.perf_counter()
    pipe = DiffusionPipeline.from_pretrained(out)
    loaded = time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipe([207], num_inference_steps=1, generator=generator, output_type="pt").images
    sampled = time.perf_counter()
    if not bool(torch.isfinite(image).all()):
        raise RuntimeError(f"{out}: sampled values that are not finite")
    totals = ditq_runtime.execution_report(pipe.transformer).totals
    return {
        "load_seconds": loaded - begin,
        "sample_seconds": sampled - loaded,
        "integer_linears": totals["integer_linears"],
        "weight_only_linears": totals["weight_only_linears"],
    }


def run(
    out: Path, only: str = "", blocks: int = BLOCKS, samples: int = SAMPLES
) -> list[dict[str, Any]]:
    """Run the stages whose name contains one of `only`'s parts; every one's record also goes to OUT/records.

    Args:
        out: folder of everything.
        only: parts of names, comma-separated; empty: all.
        blocks: of the model.
        samples: guided, to calibrate on.

    Raises:
        ValueError: no stage has such a name.
    """
    every = stages(out, blocks, samples)
    parts = [part.strip() for part in only.split(",") if part.strip()] or [""]
    asked = [stage for stage in every if any(part in stage.name for part in parts)]
    if not asked:
        names = ", ".join(stage.name for stage in every)
        raise ValueError(f"full-size: no stage is like {only!r}; there are {names}")
    out.mkdir(parents=True, exist_ok=True)
    missing = [stage for stage in asked if not _is_done(out, stage)]
    log = Log(out / LOG, len(asked), len(asked) - len(missing))
    for stage in missing:
        log.write(f"{stage.name} begins{_own_log(stage)}")
        record = {**in_process(stage), "blocks": blocks, "commit": commit()}
        write_json(_record(out, stage), record)
        log.finished(f"{stage.name}: {record['cpu_seconds']:.0f} CPU s")
        print(f"{stage.name}: {record['seconds']:.0f} s", file=sys.stderr)  # noqa: T201
    kept = (_record(out, stage) for stage in every)
    return [full_size_report.read(path) for path in kept if path.exists()]


def _record(out: Path, stage: Stage) -> Path:
    return out / "records" / f"{stage.name.replace(' ', '_')}.json"


def _is_done(out: Path, stage: Stage) -> bool:
    return _record(out, stage).exists() and (stage.makes is None or stage.makes.exists())


def _own_log(stage: Stage) -> str:
    """Where a long stage tells how far it is."""
    if stage.makes is None:
        return ""
    logs = {
        run_calibration: f"{stage.makes}/calibrate.log",
        run_conversion: f"{finished.folder_of(stage.makes)}/transformer/convert.log",
    }
    return f"; its progress: {logs[stage.work]}" if stage.work in logs else ""


def in_process(stage: Stage) -> dict[str, Any]:
    """Run a stage in a fresh process: its figures, seconds, peak memory and the machine's load.

    Raises:
        RuntimeError: it failed; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(stage, theirs))
    process.start()
    theirs.close()
    try:
        record: dict[str, Any] = ours.recv()
    except EOFError:
        raise RuntimeError(f"full_size: {stage.name} failed; see its traceback") from None
    finally:
        process.join()
    return record


def measure(stage: Stage, connection: Any) -> None:
    """In that process: imports first, then the work, timed."""
    import torch

    import ditq_converters
    from ditq_converters.memory import held, peak_rss

    assert ditq_converters.__all__  # imported before the clock starts
    before = held(torch.device("cpu"))
    load, begin, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    figures = stage.work(*stage.arguments)
    connection.send(
        {
            "stage": stage.name,
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
            "peak_rss": peak_rss(),
            "rss_before": before,
            "load_before": load,
            "load_after": os.getloadavg()[0],
            "threads": torch.get_num_threads(),
            **figures,
        }
    )


def _parts(stats: pstats.Stats) -> dict[str, float]:
    """CPU seconds, so that other work on the machine does not count."""
    parts = dict.fromkeys(PARTS.values(), 0.0)
    for (path, _, function), (_, _, _, seconds, _) in stats.stats.items():  # type: ignore[attr-defined]
        part = PARTS.get(f"{Path(path).stem}:{function}")
        if part is not None and "ditq_converters" in path:
            parts[part] = max(parts[part], seconds)
    return parts


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove(out: Path) -> None:
    """The models, statistics and checkpoints of OUT; the records stay."""
    for stage in stages(out):
        if stage.makes is not None:
            shutil.rmtree(stage.makes, ignore_errors=True)

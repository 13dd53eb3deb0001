"""`ditq calibrate`: statistics of a float model, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditq_converters.cli import options as o
from ditq_runtime.cli.output import print_json, say


def calibrate(
    model: o.ModelArgument,
    out: Annotated[
        Path, typer.Option(help="Folder for the statistics; the same command resumes there.")
    ],
    inputs: o.InputsOption = None,
    prompts: o.PromptsOption = None,
    labels: o.LabelsOption = None,
    samples: o.ImagesOption = None,
    steps: o.CallsOption = None,
    cfg: o.CfgOption = None,
    height: o.HeightOption = None,
    width: o.WidthOption = None,
    sampler: o.SamplerOption = "",
    seed: o.SeedOption = 0,
    batch: o.BatchOption = None,
    rows: o.RowsOption = 64,
    memory_budget: o.MemoryOption = "",
    attention: o.RecordAttentionOption = True,
    device: o.DeviceOption = "",
    json: o.JsonOption = False,
) -> None:
    """Run the float pipeline and record the range of every linear input, per timestep and channel.

    A class-conditional model needs nothing; others are told what to draw. Killed, it goes on after the last finished
    input; more inputs at the end of the file are added; processes started by torchrun or accelerate share the work.
    One calibration serves every method.

    Example: ditq calibrate demo:digits --out stats --steps 50 --samples 32

    Example: ditq calibrate MODEL --inputs calls.jsonl --out stats
    """
    from ditq_converters.calibrate.run import calibrate as run
    from ditq_converters.calibrate.share import check_place
    from ditq_converters.memory import format_bytes, peak_rss
    from ditq_converters.models.open import open_model
    from ditq_runtime.calls.labels import read_labels

    budget = _check(sampler, samples, inputs, labels, prompts, memory_budget)
    check_place(out)
    pipe = open_model(model, memory_budget=budget)
    listed = read_labels(labels, pipe) if labels else None
    o.place(pipe, device)
    stats = run(
        pipe, out, inputs, prompts=prompts, labels=listed, samples=samples, batch=batch, steps=steps, guidance=cfg,
        sampler=sampler or None, seed=seed, rows=rows, attention=attention, memory_budget=budget,
        free_text_encoders=True, **o.sizes(height, width),
    )  # fmt: skip
    size, peak = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()), peak_rss()
    found = {name: stats.of(name).timesteps for name in stats.components}
    if json:
        report = {"out": str(out), "inputs": len(stats.manifest["inputs"]), "bytes": size}
        print_json({**report, "timesteps": found, "peak_rss_bytes": peak})
        return
    calls = ", ".join(f"{len(times)} timesteps of {name}" for name, times in found.items())
    say(
        f"{out}: {calls} from {len(stats.manifest['inputs'])} inputs, {size / 2**20:.2f} MiB of statistics; "
        f"at most {format_bytes(peak)} of main memory"
    )


def _check(
    sampler: str,
    samples: int | None,
    inputs: Path | None,
    labels: Path | None,
    prompts: Path | None,
    memory: str,
) -> int | None:
    """Refuse what needs no model to be refused; return the memory budget in bytes."""
    from ditq_runtime.calls.schedulers import SAMPLERS

    if sampler and sampler not in SAMPLERS:
        raise typer.BadParameter(
            f"--sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}."
        )
    files = {"--inputs": inputs, "--labels": labels, "--prompts": prompts}
    given = {name: path for name, path in files.items() if path is not None}
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} say the same in two ways; give one.")
    if labels is not None and samples is not None:
        raise typer.BadParameter(
            "--labels lists one class per sample; leave --samples out, or drop --labels."
        )
    return o.parse_budget(memory)

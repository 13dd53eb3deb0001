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
    steps: o.CallsOption = None,
    samples: o.ImagesOption = None,
    cfg: o.CfgOption = 1.5,
    sampler: o.SamplerOption = "",
    seed: o.SeedOption = 0,
    batch: o.BatchOption = 32,
    rows: o.RowsOption = 64,
    cfg_channels: o.CfgChannelsOption = None,
    labels: o.LabelsOption = None,
    prompts: o.PromptsOption = None,
    memory_budget: o.MemoryOption = "",
    attention: o.RecordAttentionOption = True,
    device: o.DeviceOption = "",
    json: o.JsonOption = False,
) -> None:
    """Run the float model from noise and record the range of every linear input, per call and channel.

    Needs no data. Killed, it resumes at the call it was in. One calibration serves every method.

    Example: ditq calibrate demo:digits --out stats --steps 50 --samples 32
    """
    from ditq_converters.calibrate.labels import read_labels
    from ditq_converters.calibrate.memory import format_bytes, peak_rss
    from ditq_converters.calibrate.run import calibrate as run
    from ditq_converters.models.open import open_model, transformer_of

    budget = _check(sampler, samples, labels, prompts, memory_budget)
    pipe = open_model(model, memory_budget=budget)
    listed = read_labels(labels, pipe, transformer_of(pipe)) if labels else None
    o.place(pipe, device)
    stats = run(
        pipe, out, steps, samples or 32, cfg, sampler or None, seed, batch,
        rows=rows, cfg_channels=cfg_channels, labels=listed, prompts=prompts, memory_budget=budget,
        attention=attention,
    )  # fmt: skip
    size, peak = sum(file.stat().st_size for file in out.iterdir()), peak_rss()
    micro_batch = stats.manifest["plan"]["micro_batch"]
    if json:
        report = {
            "out": str(out),
            "calls": stats.calls,
            "bytes": size,
            "timesteps": stats.timesteps,
        }
        print_json({**report, "micro_batch": micro_batch, "peak_rss_bytes": peak})
    else:
        say(
            f"{out}: {stats.calls} calls, {size / 2**20:.2f} MiB of statistics; "
            f"{micro_batch} samples per forward, at most {format_bytes(peak)} of main memory"
        )


def _check(
    sampler: str, samples: int | None, labels: Path | None, prompts: Path | None, memory: str
) -> int | None:
    """Refuse what needs no model to be refused; return the memory budget in bytes."""
    from ditq_converters.calibrate.samplers import SAMPLERS

    if sampler and sampler not in SAMPLERS:
        raise typer.BadParameter(
            f"--sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}."
        )
    if labels is not None and prompts is not None:
        raise typer.BadParameter(
            "--labels is for models that are told classes, --prompts for those that are told text; give one."
        )
    if labels is not None and samples is not None:
        raise typer.BadParameter(
            "--labels lists one class per sample; leave --samples out, or drop --labels."
        )
    return o.parse_budget(memory)

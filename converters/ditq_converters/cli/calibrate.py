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
    steps: o.StepsOption = 50,
    samples: o.SamplesOption = 32,
    cfg: o.CfgOption = 1.5,
    sampler: o.SamplerOption = "ddim",
    seed: o.SeedOption = 0,
    batch: o.BatchOption = 32,
    device: o.DeviceOption = "",
    json: o.JsonOption = False,
) -> None:
    """Run the float model from noise and record the range of every linear input, per call and channel.

    Needs no data. Killed, it resumes at the call it was in. One calibration serves every method.

    Example: ditq calibrate demo:digits --out stats --steps 50 --samples 32
    """
    from ditq_converters.calibrate import SAMPLERS
    from ditq_converters.calibrate import calibrate as run
    from ditq_converters.models import open_model

    if sampler not in SAMPLERS:
        raise typer.BadParameter(
            f"--sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}."
        )
    pipe = open_model(model)
    o.place(pipe, device)
    stats = run(pipe, out, steps, samples, cfg, sampler, seed, batch)
    size = sum(file.stat().st_size for file in out.iterdir())
    if json:
        print_json(
            {"out": str(out), "calls": stats.calls, "bytes": size, "timesteps": stats.timesteps}
        )
    else:
        say(f"{out}: {stats.calls} calls, {size / 2**20:.2f} MiB of statistics")

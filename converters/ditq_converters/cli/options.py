"""Options that several commands share, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="demo:digits, demo:digits-salient, a diffusers folder, or a hub id."
    ),
]
MethodOption = Annotated[str, typer.Option(help="linear or smoothquant.")]
WeightsOption = Annotated[
    str, typer.Option(help="w8 (int8 per channel) or w4p (4 bits, two-level groups).")
]
ActivationsOption = Annotated[
    str, typer.Option(help="token (a scale per token) or static (calibrated range).")
]
GroupSizeOption = Annotated[int, typer.Option(help="Input channels per w4p group.")]
ModulationOption = Annotated[
    str, typer.Option(help="Weights of the AdaLN linears: w8 or w4p; default: as --weights.")
]
KeepOption = Annotated[list[str], typer.Option(help="Glob of linears that stay float; repeatable.")]
AlphaOption = Annotated[float, typer.Option(help="Migration strength of smoothing, 0 to 1.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Model calls per calibration sample.")]
SamplesOption = Annotated[int, typer.Option(min=1, help="Calibration samples.")]
CfgOption = Annotated[float, typer.Option(help="Guidance weight; statistics cover both halves.")]
SamplerOption = Annotated[str, typer.Option(help="ddim or ddpm.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of classes and noise.")]
BatchOption = Annotated[
    int, typer.Option(min=1, help="Samples per forward; lower it to save memory.")
]
DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1; default: cuda where there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def place(pipe: object, device: str) -> None:
    """Move a model to `device`, or to the GPU where there is one."""
    import torch

    pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[attr-defined]

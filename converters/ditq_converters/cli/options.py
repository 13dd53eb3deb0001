"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="demo:digits or demo:digits-flow (both also with -salient and -asymmetric), a diffusers folder, a hub id, "
        "or a .pt of DiT's own code.",
    ),
]
RecordAttentionOption = Annotated[
    bool,
    typer.Option("--attention/--no-attention", help="Also record the ranges of Q, K and V."),
]
CfgOption = Annotated[
    float | None,
    typer.Option(
        help="Guidance weight of inputs that name none; default: the pipeline's own, 1.5 for classes."
    ),
]
SamplerOption = Annotated[
    str,
    typer.Option(
        help="ddim, ddpm, dpmsolver++, euler or flow, instead of the pipeline's own scheduler."
    ),
]
CallsOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Steps of inputs that name none; default: the pipeline's own, 50 for classes."
    ),
]
ImagesOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many classes or prompts to draw; default: 32 classes, all prompts."
    ),
]
InputsOption = Annotated[
    Path | None,
    typer.Option(
        help="What to call the pipeline with: .jsonl with one call's arguments per line (paths for images), text with "
        "one prompt or class per line, or .safetensors of embeddings."
    ),
]
SitesOption = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        help="To find sites by, where its configuration is not enough: as calibrate takes, or .safetensors of the "
        "arguments of one forward.",
    ),
]
HeightOption = Annotated[
    int | None,
    typer.Option(min=8, help="Pixels, of inputs that name none; default: the pipeline's own."),
]
WidthOption = Annotated[
    int | None,
    typer.Option(min=8, help="Pixels, of inputs that name none; default: the pipeline's own."),
]
RowsOption = Annotated[
    int,
    typer.Option(
        min=0, help="Input rows to keep per site and call, for methods that search; 0 for none."
    ),
]
LabelsOption = Annotated[
    Path | None, typer.Option(help="Text file with one class id or name per line, one per sample.")
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="As --inputs, for prompts: a text file with one per line, or .safetensors of embeddings."
    ),
]
MemoryOption = Annotated[
    str,
    typer.Option(
        help="Such as 6GiB: main memory to stay below. A model that does not fit is read block by block."
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of classes and noise.")]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Classes per call, where classes are drawn; default: 8.")
]
DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1; default: cuda where there is one.")
]
VerifyOption = Annotated[
    bool, typer.Option("--verify", help="Compare every tensor of a packed folder with its digest.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


OutArgument = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="Folder to write; it appears complete or not at all."),
]
StatsOption = Annotated[
    Path | None,
    typer.Option(help="Statistics of `ditq calibrate`; default: OUT.stats, made if needed."),
]
ShardOption = Annotated[str, typer.Option(help="As in diffusers' save_pretrained.")]


def place(pipe: Any, device: str) -> None:
    """Move a model to `device`, or to the GPU where there is one; of one on disk, what is loaded and what will be."""
    from ditq_converters.streaming.model import move, streamed_of
    from ditq_runtime.calls.parts import transformers_in
    from ditq_runtime.cli.device import place as device_of

    chosen = device_of(device)
    streamed = [m for m in transformers_in(pipe).values() if streamed_of(m) is not None]
    for model in streamed:
        move(model, chosen)
    if not streamed:
        pipe.to(chosen)


def sizes(height: int | None, width: int | None) -> dict[str, Any]:
    """Arguments of every call, as far as they were given."""
    asked = {"height": height, "width": width}
    return {name: value for name, value in asked.items() if value is not None}


def parse_budget(text: str) -> int | None:
    """--memory-budget in bytes; None where it was not given."""
    from ditq_converters.memory import parse_bytes

    try:
        return parse_bytes(text) if text else None
    except ValueError as error:
        raise typer.BadParameter(f"--memory-budget: {error}.") from error

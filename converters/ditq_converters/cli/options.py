"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="demo:digits, demo:digits-salient, demo:digits-asymmetric, a diffusers folder, or a hub id.",
    ),
]
MethodOption = Annotated[
    str, typer.Option(help="linear, smoothquant, meta, ditas, ptq4dit or htg.")
]
WeightsOption = Annotated[
    str,
    typer.Option(
        help="w8 (int8 per channel), w4p (4 bits, two-level groups) or w4g (4 bits, real scales)."
    ),
]
ActivationsOption = Annotated[
    str, typer.Option(help="token (a scale per token) or static (calibrated range).")
]
RangeMethodOption = Annotated[
    str,
    typer.Option(help="Static range: minmax, or searched on rows: qdiff_mse, ptq4dit_pct."),
]
ProfileOption = Annotated[
    str,
    typer.Option(help="int; paper and code round in float: only `ditq bench profiles` takes them."),
]
RoundingOption = Annotated[
    str, typer.Option(help="nearest, or gptq: later columns make up for the error of earlier ones.")
]
BiasCorrectionOption = Annotated[
    bool,
    typer.Option(
        "--bias-correction", help="Take the mean output error on sampled rows back through biases."
    ),
]
GroupSizeOption = Annotated[int, typer.Option(help="Input channels per group of w4p or w4g.")]
ModulationOption = Annotated[
    str, typer.Option(help="Weights of the AdaLN linears: w8, w4p or w4g; default: as --weights.")
]
SymmetricOption = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric", help="w4g without zero points; default: as the method has it."
    ),
]
AttentionOption = Annotated[
    str,
    typer.Option(
        help="none (float), int8 or bf16 (type of P and V; Q and K are int8); default: as the method has it."
    ),
]
AttentionScalesOption = Annotated[
    str, typer.Option(help="token or static (calibrated, per head); default: as --activations.")
]
RecordAttentionOption = Annotated[
    bool,
    typer.Option("--attention/--no-attention", help="Also record the ranges of Q, K and V."),
]
KeepOption = Annotated[list[str], typer.Option(help="Glob of linears that stay float; repeatable.")]
AlphaOption = Annotated[float, typer.Option(help="Migration strength of smoothing, 0 to 1.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Model calls per calibration sample.")]
SamplesOption = Annotated[int, typer.Option(min=1, help="Calibration samples.")]
CfgOption = Annotated[float, typer.Option(help="Guidance weight; statistics cover both halves.")]
SamplerOption = Annotated[
    str,
    typer.Option(
        help="ddim, ddpm, dpmsolver++, flow or t_max; default: flow for flow-matching models, else ddim."
    ),
]
CallsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Model calls per sample; default: 50, and 1 for t_max."),
]
ImagesOption = Annotated[
    int | None,
    typer.Option(min=1, help="Calibration samples; default: 32, or as many as --labels."),
]
RowsOption = Annotated[
    int,
    typer.Option(
        min=0, help="Input rows to keep per site and call, for methods that search; 0 for none."
    ),
]
CfgChannelsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Guide only the first channels (3: DiT's own code); default: all."),
]
LabelsOption = Annotated[
    Path | None, typer.Option(help="Text file with one class id or name per line, one per sample.")
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="For models that are told text: a text file with one prompt per line, or .safetensors of embeddings."
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
    int, typer.Option(min=1, help="Samples per forward; lower it to save memory.")
]
DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1; default: cuda where there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


OutArgument = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="Folder to write; it appears complete or not at all."),
]
LoraRankOption = Annotated[
    int | None,
    typer.Option(min=0, help="Rank of a low-rank branch; default: as the method has it."),
]
SearchOption = Annotated[
    bool, typer.Option("--search/--no-search", help="ditas: search alpha per layer.")
]
SscOption = Annotated[
    bool, typer.Option("--ssc/--no-ssc", help="ptq4dit: weigh calls by rank correlation.")
]
ShiftOption = Annotated[bool, typer.Option("--shift/--no-shift", help="htg: shift channels.")]
ScaleOption = Annotated[bool, typer.Option("--scale/--no-scale", help="htg: scale channels.")]
GroupsOption = Annotated[
    int | None, typer.Option(min=1, help="htg: timestep groups; default: a tenth of the calls.")
]
LinkageOption = Annotated[str, typer.Option(help="htg: ward, centroid, average or exact_dp.")]
EmaOption = Annotated[float, typer.Option(help="htg: moving average of channel ranges.")]
StatsOption = Annotated[
    Path | None,
    typer.Option(help="Statistics of `ditq calibrate`; default: OUT.stats, made if needed."),
]
ShardOption = Annotated[str, typer.Option(help="As in diffusers' save_pretrained.")]


def place(pipe: Any, device: str) -> None:
    """Move a model to `device`, or to the GPU where there is one; of one on disk, what is loaded and what will be."""
    from ditq_converters.models.open import transformer_of
    from ditq_converters.streaming.model import move, streamed_of
    from ditq_runtime.cli.device import place as device_of

    chosen = device_of(device)
    model = transformer_of(pipe)
    if streamed_of(model) is None:
        pipe.to(chosen)
    else:
        move(model, chosen)


def parse_budget(text: str) -> int | None:
    """--memory-budget in bytes; None where it was not given."""
    from ditq_converters.calibrate.memory import parse_bytes

    try:
        return parse_bytes(text) if text else None
    except ValueError as error:
        raise typer.BadParameter(f"--memory-budget: {error}.") from error

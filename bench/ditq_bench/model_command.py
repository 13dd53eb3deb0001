"""`ditq bench model`."""

from __future__ import annotations

import csv
import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from ditq_bench.chosen import chosen_of

FIELDS = (
    "device", "ditq", "torch", "triton", "commit", "model", "images", "steps", "what", "mode",
    "warm_up_s", "p20_ms", "median_ms", "p80_ms", "rounds", "peak_bytes", "skipped",
)  # fmt: skip
COLUMNS = ("what", "mode", "warm-up, s", "median, ms", "spread, %", "rounds", "skipped")


ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A packed or float pipeline folder, or demo:digits."),
]
ImagesOption = Annotated[int, typer.Option(min=1, help="Images per run.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Denoising steps of a run.")]
ModesOption = Annotated[
    str,
    typer.Option(help="eager, compiled, graph, and of a run hoisted; default: those that can run."),
]
AgainstOption = Annotated[
    str,
    typer.Option(
        help="Of a float MODEL: its step by ditq in W8A8, and by torchao, sdnq, sageattention where installed."
    ),
]
SizeOption = Annotated[
    int, typer.Option(min=0, help="Pixels of an image's side; default: the pipeline's own.")
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda; default: cuda where there is one.")]
BudgetOption = Annotated[float, typer.Option(min=0.01, help="Seconds of timing.")]
OutOption = Annotated[Path, typer.Option(help="Folder for model.csv and model.html.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def model(
    model: ModelArgument,
    images: ImagesOption = 8,
    steps: StepsOption = 50,
    modes: ModesOption = "",
    against: AgainstOption = "",
    size: SizeOption = 0,
    dtype: DtypeOption = "",
    device: DeviceOption = "",
    budget: BudgetOption = 60.0,
    out: OutOption = Path("runs/bench"),
    json: JsonOption = False,
) -> None:
    """Time one denoising step and a whole sampling run; warm-up apart, with the peak of memory.

    Hoisted and graph runs are those of `ditq.prepare`, for packed models. What a run has compiled, its step finds
    compiled. Peak memory is that of the CUDA allocator, or of the whole process on a CPU.

    Example: ditq bench model demo:digits --images 4 --steps 10
    """
    from ditq_bench.model import (
        MODES,
        Sampling,
        bench_run,
        bench_step,
        peak_memory,
        recorded_step,
    )
    from ditq_bench.model_peers import bench_peers
    from ditq_bench.page import facts_of, write_model_page
    from ditq_bench.results import doubt, origin_of, told
    from ditq_runtime.cli.device import place as device_of
    from ditq_runtime.cli.output import print_json, print_table, say

    place = device_of(device)
    names, kind = _modes(modes, place), _dtype(dtype, place)
    pipe = open_pipeline(model, kind, place)
    peers = _peers(against, pipe.transformer, place)
    sides = {"height": size, "width": size} if size else None
    if sides and "height" not in inspect.signature(pipe.__call__).parameters:
        raise typer.BadParameter(f"--size: {type(pipe).__name__} takes none; leave it out.")
    with peak_memory(place) as memory:
        step = recorded_step(pipe, images, sides)
        measured = [*bench_run(Sampling(pipe, images, steps, sides), place, names, budget / 2)]
        of_step = tuple(name for name in names if name in MODES)
        measured += bench_step(step, place, of_step, budget / 2)
        if peers:
            measured += bench_peers(step, peers, place, budget / 2)
    origin = origin_of(place)
    rows = [_fields(row, origin, model, images, steps, memory["peak_bytes"]) for row in measured]
    _write_csv(out / "model.csv", rows)
    title = f"{model}: {images} images, {steps} steps, {kind}"
    timed = [(f"{row.what}, {row.mode}", row.timing) for row in measured if row.timing is not None]
    found = [sentence for name, timing in timed for sentence in doubt(name, timing)]
    table = [_shown(row) for row in measured]
    peak = f"{memory['peak_bytes'] / 2**20:.0f} MiB"
    write_model_page(out, title, COLUMNS, table, found, {**facts_of(origin), "peak memory": peak})
    if json:
        print_json(rows)
        return
    print_table(f"{title}; {told(origin)}", COLUMNS, table)
    for sentence in found:
        say(sentence)
    say(f"peak memory {peak}; {out / 'model.csv'}; {out / 'model.html'}: open it in a browser")


def _peers(against: str, transformer: Any, place: Any) -> tuple[str, ...]:
    """The libraries asked for; those that cannot run this model here are refused."""
    from ditq_bench.model_peers import KNOWN, why_not

    names = chosen_of("--against", against, KNOWN) if against else ()
    if names and getattr(transformer.config, "quantization_config", None) is not None:
        raise typer.BadParameter("--against: MODEL is quantized already; give a float one.")
    for name in names:
        reason = why_not(name, transformer, place)
        if reason:
            raise typer.BadParameter(f"--against {name}: {reason}; leave it out.")
    return names


def _modes(modes: str, place: Any) -> tuple[str, ...]:
    """Those asked for, or those that can run there."""
    from ditq_bench.model import RUN_MODES

    usual = "eager,compiled,hoisted,graph" if place.type == "cuda" else "eager"
    names = chosen_of("--modes", modes or usual, tuple(RUN_MODES))
    if "graph" in names and place.type != "cuda":
        raise typer.BadParameter(f"--modes: graph needs a CUDA GPU, and this runs on {place}.")
    return names


def _dtype(dtype: str, place: Any) -> Any:
    """The float dtype asked for, or the device's usual one."""
    import torch

    kind = getattr(torch, dtype or ("bfloat16" if place.type == "cuda" else "float32"), None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise typer.BadParameter(f"--dtype: float32, bfloat16 or float16, got {dtype!r}.")
    return kind


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows, atomically."""
    from ditq_runtime.files import atomic_file

    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def open_pipeline(model: str, dtype: Any, device: Any) -> Any:
    """A packed folder as a user opens it, or a float model.

    Raises:
        ValueError: a transformer alone: it cannot sample.
    """
    from ditq_converters.models.open import open_model
    from ditq_runtime.cli.opening import open_packed
    from ditq_runtime.format.folder import open_folder

    if Path(model).is_dir() and open_folder(model).scheme is not None:
        pipe = open_packed(model, str(dtype).removeprefix("torch."), device)
    else:
        pipe = open_model(model, dtype)
        if not hasattr(pipe, "transformer"):
            raise ValueError(f"{model}: a transformer alone cannot sample; give a pipeline folder")
        pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _shown(row: Any) -> tuple[Any, ...]:
    """What people read of a row."""
    t = row.timing
    if t is None:
        return (row.what, row.mode, row.warm_up, "", "", "", row.skipped)
    return (row.what, row.mode, row.warm_up, 1e3 * t.median, round(100 * t.spread), t.rounds, "")


def _fields(
    row: Any, origin: tuple[str, ...], model: str, images: int, steps: int, peak: int
) -> dict[str, Any]:
    t = row.timing
    times = [""] * 3 if t is None else [round(1e3 * s, 4) for s in (t.p20, t.median, t.p80)]
    values = (
        *origin, model, images, steps, row.what, row.mode, round(row.warm_up, 3),
        *times, 0 if t is None else t.rounds, peak, row.skipped,
    )  # fmt: skip
    return dict(zip(FIELDS, values, strict=True))

"""`ditq convert`: a float model in, a packed diffusers folder out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ditq_converters.cli import options as o
from ditq_runtime.cli.output import mebibytes, print_json, print_table, say


def convert(
    model: o.ModelArgument,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder to write; it appears complete or not at all."),
    ],
    method: o.MethodOption = "smoothquant",
    weights: o.WeightsOption = "w8",
    activations: o.ActivationsOption = "token",
    group_size: o.GroupSizeOption = 64,
    modulation: o.ModulationOption = "",
    keep: o.KeepOption = [],  # noqa: B006  typer needs a list default and does not mutate it
    lora_rank: Annotated[
        int | None,
        typer.Option(min=0, help="Rank of a low-rank branch; default: as the method has it."),
    ] = None,
    alpha: o.AlphaOption = 0.5,
    search: Annotated[
        bool, typer.Option("--search/--no-search", help="ditas: search alpha per layer.")
    ] = True,
    ssc: Annotated[
        bool, typer.Option("--ssc/--no-ssc", help="ptq4dit: weigh calls by rank correlation.")
    ] = True,
    shift: Annotated[bool, typer.Option("--shift/--no-shift", help="htg: shift channels.")] = True,
    scale: Annotated[bool, typer.Option("--scale/--no-scale", help="htg: scale channels.")] = True,
    groups: Annotated[
        int | None, typer.Option(min=1, help="htg: timestep groups; default: a tenth of the calls.")
    ] = None,
    linkage: Annotated[
        str, typer.Option(help="htg: ward, centroid, average or exact_dp.")
    ] = "ward",
    ema: Annotated[float, typer.Option(help="htg: moving average of channel ranges.")] = 0.99,
    stats: Annotated[
        Path | None,
        typer.Option(help="Statistics of `ditq calibrate`; default: OUT.stats, made if needed."),
    ] = None,
    steps: o.StepsOption = 50,
    samples: o.SamplesOption = 32,
    cfg: o.CfgOption = 1.5,
    seed: o.SeedOption = 0,
    batch: o.BatchOption = 32,
    max_shard_size: Annotated[str, typer.Option(help="As in diffusers' save_pretrained.")] = "10GB",
    device: o.DeviceOption = "",
    json: o.JsonOption = False,
) -> None:
    """Convert a float Diffusion Transformer into a packed low-bit checkpoint.

    Calibrates first where the recipe needs it and no --stats are given; the statistics stay in OUT.stats, serve
    later conversions, and let a killed run resume.

    Example: ditq convert demo:digits out --method smoothquant --weights w4p
    """
    from ditq_converters.calibrate import calibrate
    from ditq_converters.convert import convert as run
    from ditq_converters.methods import METHODS
    from ditq_converters.models import open_model, transformer_of
    from ditq_converters.plan import plan_layers
    from ditq_converters.recipe import Recipe
    from ditq_converters.stats import CalibrationStats
    from ditq_runtime.families import family_of
    from ditq_runtime.files import check_new

    try:
        recipe = Recipe(
            method,
            weights,
            activations,
            group_size,
            modulation or None,
            tuple(keep),
            lora_rank,
            alpha,
            search=search,
            ssc=ssc,
            shift=shift,
            scale=scale,
            num_groups=groups,
            linkage=linkage,
            ema=ema,
        )
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from error
    check_new(out)
    begin = time.perf_counter()
    pipe = open_model(model)
    transformer = transformer_of(pipe)
    plan_layers(
        transformer, family_of(type(transformer).__name__), recipe
    )  # refuse before the long work
    o.place(pipe, device)
    opened = None
    if stats is not None:
        opened = CalibrationStats.open(stats)
    elif recipe.needs_statistics:
        folder = out.with_name(f"{out.name}.stats")
        one_step = METHODS[method].static_call is not None
        opened = calibrate(
            pipe,
            folder,
            None if one_step else steps,
            samples,
            cfg,
            sampler="t_max" if one_step else "ddim",
            seed=seed,
            micro_batch=batch,
            rows=64 if recipe.needs_rows else 0,
        )
    run(pipe, recipe, opened, out, max_shard_size)
    _print(out, time.perf_counter() - begin, json)


def _print(out: Path, seconds: float, json: bool) -> None:
    from ditq_runtime.folder import open_folder, size_by_category

    folder = open_folder(out)
    sizes = size_by_category(folder)
    if json:
        print_json(
            {
                "out": str(out),
                "seconds": seconds,
                "bytes": folder.nbytes,
                "bytes_by_category": sizes,
            }
        )
        return
    rows = [(name, mebibytes(size)) for name, size in sizes.items() if size]
    print_table(
        "transformer on disk", ("category", "size"), [*rows, ("total", mebibytes(folder.nbytes))]
    )
    say(f"{out}: written in {seconds:.1f} s; sample from it with `ditq sample {out} --out x.png`")

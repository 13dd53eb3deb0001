"""`ditq convert`: a float model in, a packed diffusers folder out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ditq_converters.cli import options as o
from ditq_runtime.cli.output import mebibytes, print_json, print_table, say

if TYPE_CHECKING:
    from ditq_converters.plan.recipe import Recipe
    from ditq_runtime.format.scheme import Scheme


def convert(
    model: o.ModelArgument,
    out: o.OutArgument,
    method: o.MethodOption = "smoothquant",
    weights: o.WeightsOption = "w8",
    activations: o.ActivationsOption = "token",
    group_size: o.GroupSizeOption = 64,
    modulation: o.ModulationOption = "",
    attention: o.AttentionOption = "",
    attention_scales: o.AttentionScalesOption = "",
    keep: o.KeepOption = [],  # noqa: B006  typer needs a list default and does not mutate it
    lora_rank: o.LoraRankOption = None,
    alpha: o.AlphaOption = 0.5,
    search: o.SearchOption = True,
    ssc: o.SscOption = True,
    shift: o.ShiftOption = True,
    scale: o.ScaleOption = True,
    groups: o.GroupsOption = None,
    linkage: o.LinkageOption = "ward",
    ema: o.EmaOption = 0.99,
    range_method: o.RangeMethodOption = "minmax",
    rounding: o.RoundingOption = "nearest",
    bias_correction: o.BiasCorrectionOption = False,
    profile: o.ProfileOption = "int",
    symmetric: o.SymmetricOption = None,
    stats: o.StatsOption = None,
    steps: o.StepsOption = 50,
    samples: o.SamplesOption = 32,
    cfg: o.CfgOption = 1.5,
    prompts: o.PromptsOption = None,
    seed: o.SeedOption = 0,
    batch: o.BatchOption = 32,
    max_shard_size: o.ShardOption = "10GB",
    memory_budget: o.MemoryOption = "",
    device: o.DeviceOption = "",
    json: o.JsonOption = False,
) -> None:
    """Convert a float Diffusion Transformer into a packed low-bit checkpoint.

    Calibrates first where the recipe needs it and no --stats are given; the statistics stay in OUT.stats, serve
    later conversions, and let a killed run resume. With a --memory-budget that MODEL does not fit into, its weights
    stay on disk and it is converted block by block, into the same bytes; finished blocks stay in .OUT.blocks, so that
    the same command goes on after a kill.

    Example: ditq convert demo:digits out --method smoothquant --weights w4p
    """
    from ditq_converters.plan.recipe import Recipe
    from ditq_runtime.files import check_new

    try:
        layout = (method, weights, activations, group_size, modulation or None, tuple(keep))
        choices: dict[str, Any] = {
            "search": search,
            "ssc": ssc,
            "shift": shift,
            "scale": scale,
            "ema": ema,
            "range_method": range_method,
            "rounding": rounding,
            "bias_correction": bias_correction,
            "profile": profile,
            "symmetric": symmetric,
            "attention": attention or None,
            "attention_scales": attention_scales or None,
        }
        recipe = Recipe(*layout, lora_rank, alpha, num_groups=groups, linkage=linkage, **choices)
        recipe.check_integer()
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from error
    budget = o.parse_budget(memory_budget)
    check_new(out)
    begin = time.perf_counter()
    plan = {"samples": samples, "guidance": cfg, "seed": seed, "micro_batch": batch}
    calibration = {"steps": steps, **plan, "prompts": prompts, "memory_budget": budget}
    _convert(model, out, recipe, stats, device, max_shard_size, calibration)
    _print(out, time.perf_counter() - begin, json)


def _convert(
    model: str,
    out: Path,
    recipe: Recipe,
    stats: Path | None,
    device: str,
    max_shard_size: str,
    calibration: dict[str, Any],
) -> None:
    """Open, refuse what can be refused before the long work, calibrate where needed, convert."""
    from ditq_converters.calibrate.run import calibrate
    from ditq_converters.calibrate.stats import CalibrationStats
    from ditq_converters.convert.story import convert as run
    from ditq_converters.methods import METHODS
    from ditq_converters.models.open import open_model, transformer_of
    from ditq_converters.plan.layers import plan_layers
    from ditq_runtime.families import family_of

    pipe = open_model(model, memory_budget=calibration["memory_budget"])
    transformer = transformer_of(pipe)
    plan_layers(transformer, family_of(type(transformer).__name__), recipe)
    o.place(pipe, device)
    opened = None
    if stats is not None:
        opened = CalibrationStats.open(stats)
    elif recipe.needs_statistics:
        if METHODS[recipe.method].static_call is not None:  # Meta: one forward at the highest noise
            calibration = {**calibration, "sampler": "t_max", "steps": None}
        folder = out.with_name(f"{out.name}.stats")
        opened = calibrate(pipe, folder, rows=64 if recipe.needs_rows else 0, **calibration)
    run(pipe, recipe, opened, out, max_shard_size)


def _print(out: Path, seconds: float, json: bool) -> None:
    from ditq_runtime.format.folder import open_folder
    from ditq_runtime.host.sizes import size_by_category

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
    say(f"{out}: written in {seconds:.1f} s; {_next_step(out, folder.scheme)}")


def _next_step(out: Path, scheme: Scheme | None) -> str:
    """What to do with a folder that was just written."""
    if not (out / "model_index.json").exists():
        return "load it with its diffusers class, after `import ditq_runtime`"
    told = "" if scheme and scheme.architecture == "DiTTransformer2DModel" else ' --prompt "TEXT"'
    return f"sample from it with `ditq sample {out}{told} --out x.png`"

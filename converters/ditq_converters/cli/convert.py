"""`ditq convert`: a float model in, a packed diffusers folder out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer

from ditq_converters.cli import choices as c
from ditq_converters.cli import options as o
from ditq_converters.cli.refusals import refuse_choices
from ditq_runtime.cli.output import mebibytes, print_json, print_table, say

if TYPE_CHECKING:
    from torch import nn

    from ditq_converters.calibrate.stats import CalibrationStats
    from ditq_converters.plan.plan import Plan
    from ditq_runtime.format.folder import TransformerFolder
    from ditq_runtime.format.scheme import Scheme

NAMED = 3  # names of weights that a line holds


@c.with_choices
def convert(
    context: typer.Context,
    model: o.ModelArgument,
    out: o.OutArgument,
    choices: dict[str, Any],
    plan: c.PlanOption = None,
    set: c.SetOption = [],  # noqa: B006  typer needs a list default and does not mutate it
    stats: o.StatsOption = None,
    inputs: o.InputsOption = None,
    prompts: o.PromptsOption = None,
    samples: o.ImagesOption = None,
    steps: o.CallsOption = None,
    cfg: o.CfgOption = None,
    seed: o.SeedOption = 0,
    batch: o.BatchOption = None,
    max_shard_size: o.ShardOption = "10GB",
    memory_budget: o.MemoryOption = "",
    device: o.DeviceOption = "",
    json: o.JsonOption = False,
) -> None:
    """Convert a float Diffusion Transformer into a packed low-bit checkpoint.

    Calibrates first where the plan needs it and no --stats are given; the statistics stay in OUT.stats, serve
    later conversions, and let a killed run resume. Without a --method, a model that draws prompts and was given none is
    converted without calibration. With a --memory-budget that MODEL does not fit into, its weights
    stay on disk and it is converted block by block, into the same bytes; finished blocks stay in .OUT.blocks, so that
    the same command goes on after a kill.

    Example: ditq convert demo:digits out --weights w4p

    Example: ditq convert demo:digits out --budget 16%
    """
    from ditq_runtime.files import check_new, one_writer

    refuse_choices(context, plan, c.CHOICES)
    recipe = c.recipe_of(choices)
    if str(out).startswith("demo:"):
        raise typer.BadParameter(f"OUT: {out} is the name of a built-in model; name a folder.")
    search = partial(c.searched, choices) if c.searches(choices) else None
    budget = o.parse_budget(memory_budget)
    check_new(out)
    begin = time.perf_counter()
    drawn = {"inputs": inputs, "prompts": prompts, "samples": samples, "steps": steps}
    calibration = {**drawn, "guidance": cfg, "seed": seed, "batch": batch, "memory_budget": budget}

    source = context.get_parameter_source("method")
    asked = source is not None and source.name == "COMMANDLINE"

    def planned(transformer: nn.Module, fed: bool, opened: CalibrationStats | None) -> Plan:
        chosen = recipe if plan else c.settled(choices, asked, fed, opened)
        return c.plan_for(transformer, chosen, plan, set)

    alike = plan is not None  # a plan of a file is for all transformers that it fits
    with one_writer(out, again=True):  # also while it calibrates
        _convert(model, out, planned, alike, search, stats, device, max_shard_size, calibration)
    _print(out, time.perf_counter() - begin, json)


def _convert(
    model: str,
    out: Path,
    planned: Callable[[nn.Module, bool, CalibrationStats | None], Plan],
    alike: bool,
    search: Callable[[Any, CalibrationStats], Plan] | None,
    stats: Path | None,
    device: str,
    max_shard_size: str,
    calibration: dict[str, Any],
) -> None:
    """Open, refuse what can be refused before the long work, calibrate where needed, convert."""
    from ditq_converters.calibrate.first_inputs import find_by_call
    from ditq_converters.calibrate.known_sites import know_sites
    from ditq_converters.calibrate.run import calibrate
    from ditq_converters.calibrate.stats import CalibrationStats
    from ditq_converters.cli.automatic import has_inputs, refuse_groups, tell_time
    from ditq_converters.convert.story import convert as run
    from ditq_converters.models.open import open_model
    from ditq_runtime.calls.parts import transformers_in

    opened = None if stats is None else CalibrationStats.open(stats)
    pipe = open_model(model, memory_budget=calibration["memory_budget"])
    calls = calibration["inputs"] or calibration["prompts"]
    if opened is None and calls is not None:
        find_by_call(pipe, calls)
    models = transformers_in(pipe)
    for name, transformer in models.items():
        know_sites(transformer, opened and opened.of(name))
    fed = opened is not None or has_inputs(pipe, calibration)
    plans = {
        name: planned(models[name], fed, opened) for name in list(models)[: 1 if alike else None]
    }
    refuse_float(plans.values())
    o.place(pipe, device)
    if opened is None and any(plan.needs_statistics for plan in plans.values()):
        refuse_groups(pipe, plans.values(), calibration)
        folder = out.with_name(f"{out.name}.stats")
        rows = 64 if any(plan.needs_rows for plan in plans.values()) else 0
        opened = calibrate(pipe, folder, rows=rows, **calibration)
    chosen: Plan | dict[str, Plan] = next(iter(plans.values())) if alike else plans
    tell_time(models, plans, opened, search is not None)
    if search is not None:
        assert opened is not None  # what auto starts from needs statistics
        chosen = search(pipe, opened)
    run(pipe, chosen, opened, out, max_shard_size)


def refuse_float(plans: Iterable[Plan]) -> None:
    """ValueError where no linear of any transformer would have integers."""
    from ditq_converters.plan.entries import QUANTIZED

    linears = [linear for plan in plans for linear in plan.linears]
    if not any(linear.weights in QUANTIZED for linear in linears):
        raise ValueError(
            f"convert: all {len(linears)} linears stay float, nothing would be quantized; keep fewer of them"
        )


def _print(out: Path, seconds: float, json: bool) -> None:
    from ditq_runtime.format.folder import transformer_folders
    from ditq_runtime.host.sizes import add_up, float_weights, size_by_category

    folders = transformer_folders(out)
    packed = {name: folder for name, folder in folders.items() if folder.scheme is not None}
    sizes = add_up(size_by_category(folder) for folder in packed.values())
    total = sum(folder.nbytes for folder in packed.values())
    if json:
        made = {"out": str(out), "seconds": seconds, "bytes": total, "bytes_by_category": sizes}
        shares = {name: float_weights(folder)[0] for name, folder in packed.items()}
        print_json({**made, "transformers": list(packed), "float_weights_share": shares})
        return
    rows = [(name, mebibytes(size)) for name, size in sizes.items() if size]
    title = f"{' and '.join(packed)} on disk"
    print_table(title, ("category", "size"), [*rows, ("total", mebibytes(total))])
    for name, folder in folders.items():
        say(f"{name}: {_float_part(folder)}")
    say(f"{out}: written in {seconds:.1f} s; {_next_step(out, next(iter(packed.values())).scheme)}")


def _float_part(folder: TransformerFolder) -> str:
    """What of a transformer stays float."""
    from ditq_runtime.host.sizes import float_weights

    if folder.scheme is None:
        return "stays float, all of it"
    share, names = float_weights(folder)
    if not names:
        return "no weight stays float"
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" * (len(names) > NAMED))
    return f"{100 * share:.1f} % of its weights stay float ({shown}); ditq/plan.json says why"


def _next_step(out: Path, scheme: Scheme | None) -> str:
    """What to do with a folder that was just written."""
    if not (out / "model_index.json").exists():
        return "load it with its diffusers class, after `import ditq_runtime`"
    told = "" if scheme and scheme.architecture == "DiTTransformer2DModel" else ' --prompt "TEXT"'
    return f"sample from it with `ditq sample {quote(str(out))}{told} --out x.png`"

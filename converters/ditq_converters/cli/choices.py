"""The choices of a conversion as options, declared once: `plan`, `convert` and `inspect` have all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditq_converters.cli.refusals import as_options, check_values, refuse_lost
from ditq_converters.plugins import found_methods

if TYPE_CHECKING:
    from torch import nn

    from ditq_converters.calibrate.stats import CalibrationStats
    from ditq_converters.plan.plan import Plan
    from ditq_converters.plan.recipe import Recipe


def _option(kind: Any, default: Any, text: str, *names: str, **limits: Any) -> tuple[Any, Any]:
    return Annotated[kind, typer.Option(*names, help=text, **limits)], default


# keyword of `Recipe` -> its type and help, and its default
CHOICES: dict[str, tuple[Any, Any]] = {
    "method": _option(
        str,
        "auto",
        f"auto (what is best at equal bytes; bits by --budget), or {', '.join(found_methods())}.",
    ),
    "budget": _option(
        str,
        "",
        "auto: bytes of the transformer, as 45%, 1.9MiB, smallest or largest; default: all as --weights.",
    ),
    "float_sites": _option(
        int,
        0,
        "auto: so many sites may keep float activations, where int8 costs most; slower there.",
        min=0,
    ),
    "weights": _option(
        str,
        "w8",
        "w8 (int8 per channel), w4p (4 bits, two-level groups) or w4g (4 bits, real scales).",
    ),
    "activations": _option(
        str | None,
        None,
        "token (a scale per token), token_asym (a zero point too; default of auto) or static (calibrated range).",
    ),
    "group_size": _option(
        int | None, None, "Input channels per group of w4p or w4g; default: 64, of meta 128."
    ),
    "modulation": _option(
        str | None, None, "Weights of the AdaLN linears: w8, w4p or w4g; default: as --weights."
    ),
    "modulation_activations": _option(
        str,
        "none",
        "What the AdaLN linears of blocks read: none (float), token, token_asym or static.",
    ),
    "attention": _option(
        str | None,
        None,
        "none (float), int8 or bf16 (type of P and V; Q and K are int8); default: as the method has it.",
    ),
    "attention_scales": _option(
        str | None, None, "token or static (calibrated, per head); default: as --activations."
    ),
    "keep": _option(list[str], [], "Glob of linears that stay float; repeatable."),
    "kept_dtype": _option(
        str | None,
        None,
        "What stays float is stored in fp32 (as opened) or bf16 (default of auto).",
    ),
    "lora_rank": _option(
        int | None, None, "Rank of a low-rank branch; default: as the method has it.", min=0
    ),
    "rounding": _option(
        str | None,
        None,
        "nearest, gptq (later columns make up for earlier ones), aimed (also for layers before; default of auto), or "
        "reconstruct (and learned block by block).",
    ),
    "iterations": _option(int, 400, "reconstruct: iterations per block.", min=1),
    "bias_correction": _option(
        bool,
        False,
        "Take the mean output error on sampled rows back through biases.",
        "--bias-correction",
    ),
    "range_method": _option(
        str, "minmax", "Static range: minmax, or searched on rows: qdiff_mse, ptq4dit_pct."
    ),
    "weight_range_method": _option(
        str, "minmax", "Ranges of weights: minmax, or searched by squared error: mse, ptq4dit_pct."
    ),
    "symmetric": _option(
        bool | None,
        None,
        "w4g without zero points; default: as the method has it.",
        "--symmetric/--asymmetric",
    ),
    "alpha": _option(
        float | None,
        None,
        "Migration strength of smoothing, 0 to 1; default: 0.5, of auto in 8 bits 0.65.",
    ),
    "search": _option(bool, True, "ditas: search alpha per layer.", "--search/--no-search"),
    "ssc": _option(bool, True, "ptq4dit: weigh calls by rank correlation.", "--ssc/--no-ssc"),
    "shift": _option(bool, True, "htg: shift channels.", "--shift/--no-shift"),
    "scale": _option(bool, True, "htg: scale channels.", "--scale/--no-scale"),
    "num_groups": _option(
        int | None, None, "htg: timestep groups; default: a tenth of the calls.", "--groups", min=1
    ),
    "linkage": _option(str, "ward", "htg: ward, centroid, average or exact_dp."),
    "ema": _option(float, 0.99, "htg: moving average of channel ranges."),
    "groups_per_layer": _option(
        bool,
        False,
        "htg: timestep groups of every layer by itself, not of the block.",
        "--groups-per-layer",
    ),
}
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="Change entries of the plan: PATTERN:field=value, as 'transformer_blocks.*.ff.net.2:weights=w8'; also "
        "an option of a site's method; repeatable.",
    ),
]
PlanOption = Annotated[
    Path | None,
    typer.Option("--plan", help="A plan of `ditq plan`, in place of the choices below."),
]


UNFED = (
    "no --prompts, --inputs or --stats: converted without calibration, by the weights alone; with some, on "
    "demo:digits-flow, 8 bits gain 3.5 dB and 4 bits gain 9"
)

OLD = "method smoothquant: these statistics hold no rows or calls, which auto needs; calibrate again into a new folder"


def with_choices(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option per choice; it gets them together, as its argument `choices`."""

    def run(**given: Any) -> None:
        choices = {name: given.pop(name) for name in CHOICES}
        check_values(choices)
        command(**given, choices={**choices, "keep": tuple(choices["keep"])})

    own = inspect.signature(command, eval_str=True).parameters
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(name, keyword, default=default, annotation=kind)
        for name, (kind, default) in CHOICES.items()
    ]
    kept = [part.replace(kind=keyword) for name, part in own.items() if name != "choices"]
    signature = inspect.Signature([*kept, *added])
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {part.name: part.annotation for part in signature.parameters.values()}
    return run


def recipe_of(choices: dict[str, Any]) -> Recipe:
    """The recipe; a choice that is out of its range is misuse. Where bits are searched, the one it starts from."""
    from ditq_converters.auto.budget import LARGEST, SMALLEST, check_budget
    from ditq_converters.auto.search import best
    from ditq_converters.plan.recipe import Recipe

    asked, budget = dict(choices), choices["budget"]
    del asked["budget"], asked["float_sites"]
    if is_auto(choices):
        bits = {"": asked["weights"], LARGEST: "w8"}.get(budget, "w4p")
        decided = {**best(bits), "weights": bits}
        asked |= {name: decided[name] for name in decided if _is_default(name, asked[name])}
        asked |= {"method": decided["method"], "weights": bits}
    elif budget or choices["float_sites"]:
        option = "--budget" if budget else "--float-sites"
        raise typer.BadParameter(f"{option} is for --method auto; leave it out, or take auto.")
    try:
        check_budget(budget or SMALLEST)
        recipe = Recipe(**{name: value for name, value in asked.items() if value is not None})
    except ValueError as error:
        raise typer.BadParameter(f"{as_options(str(error), choices)}.") from error
    lost = {name: value for name, value in choices.items() if not _is_default(name, value)}
    refuse_lost(recipe.method, lost)
    return recipe


def is_auto(choices: dict[str, Any]) -> bool:
    """Whether the best is to be taken, whatever it is."""
    return bool(choices["method"] == "auto")


def searches(choices: dict[str, Any]) -> bool:
    """Whether bits are to be searched for."""
    from ditq_converters.auto.budget import LARGEST, SMALLEST

    wanted = choices["budget"] not in ("", LARGEST, SMALLEST) or choices["float_sites"] > 0
    return is_auto(choices) and wanted


def without_data(choices: dict[str, Any]) -> Recipe:
    """The best recipe that needs no calibration, with the choices that were made beside it."""
    from ditq_converters.auto.search import DATA_FREE

    free = {name: DATA_FREE[name] for name in DATA_FREE if _is_default(name, choices[name])}
    return recipe_of({**choices, **free})


def settled(
    choices: dict[str, Any],
    asked: bool,
    fed: bool,
    stats: CalibrationStats | None,
) -> Recipe:
    """The recipe of the choices, where auto may have to do with less.

    Args:
        choices: that were made.
        asked: for a method, by name.
        fed: there are statistics, or a calibration can run.
        stats: those that were given.
    """
    from ditq_converters.progress import note

    recipe = recipe_of(choices)
    if not is_auto(choices):
        return recipe
    if not asked and not choices["budget"] and not choices["float_sites"]:
        if not fed:
            note(UNFED)
            return without_data(choices)
        if stats is not None and not stats.has_replay:
            note(OLD)
            return recipe_of({**choices, "method": "smoothquant"})
    return recipe


def searched(choices: dict[str, Any], pipe: Any, stats: CalibrationStats) -> Plan:
    """The plan that auto finds, with the choices that were made beside it."""
    from ditq_converters.auto.search import auto_plan

    fixed = {
        name: value
        for name, value in choices.items()
        if name not in ("method", "budget", "weights") and not _is_default(name, value)
    }
    bits = "largest" if choices["weights"] == "w8" else "smallest"
    return auto_plan(pipe, stats, choices["budget"] or bits, **fixed)


def _is_default(name: str, value: Any) -> bool:
    default = CHOICES[name][1]
    return bool(value == (tuple(default) if isinstance(default, list) else default))


def transformer_for(model: str, inputs: Path | None, stats: CalibrationStats | None) -> nn.Module:
    """The transformer of MODEL to plan for; its sites are those of statistics, or found on the first call of inputs."""
    from ditq_converters.calibrate.known_sites import know_sites
    from ditq_converters.models.open import open_skeleton
    from ditq_runtime.calls.parts import transformer_of

    if inputs is None or stats is not None:
        skeleton = open_skeleton(model)
        know_sites(skeleton, stats)
        return skeleton
    from ditq_converters.calibrate.first_inputs import find_by_call, open_for_call

    pipe = open_for_call(model)
    find_by_call(pipe, inputs)
    return transformer_of(pipe)


def plan_for(model: nn.Module, recipe: Recipe, path: Path | None, rules: list[str]) -> Plan:
    """The plan of a file, or of the choices, changed by rules and checked."""
    from ditq_converters.plan.check import check_plan
    from ditq_converters.plan.file import read_plan
    from ditq_converters.plan.make import plan_of
    from ditq_converters.sites import family_or_row

    if path is None:
        return plan_of(model, recipe, rules)
    plan = read_plan(path)
    for rule in rules:
        plan.set_rule(rule)
    check_plan(plan, model, family_or_row(model))
    return plan


def tell_others(model: str) -> None:
    """What a plan that was shown means for the further transformers of MODEL."""
    from ditq_converters.models.open import alike_beside
    from ditq_runtime.cli.output import say

    for name, same in alike_beside(model).items():
        fits = "the plan is for it too" if same else "the plan is not for it; it needs its own"
        say(f"{name}: {'the same' if same else 'other'} layers, {fits}")

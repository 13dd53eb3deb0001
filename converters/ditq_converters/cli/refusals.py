"""What is said of a choice that no conversion could take: before torch is imported, as far as that can be told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from ditq_converters.plugins import BUILT_IN, found_methods

WEIGHTS = ("w8", "w4p", "w4g")
ACTIVATIONS = ("token", "token_asym", "static")
VALUES: dict[str, tuple[str, ...]] = {  # those of `Recipe`, for a quick answer
    "weights": WEIGHTS,
    "activations": ACTIVATIONS,
    "modulation": WEIGHTS,
    "modulation_activations": (*ACTIVATIONS, "none"),
    "attention": ("none", "int8", "bf16"),
    "attention_scales": ("token", "static"),
    "kept_dtype": ("fp32", "bf16"),
    "rounding": ("nearest", "gptq", "aimed", "reconstruct"),
    "range_method": ("minmax", "qdiff_mse", "ptq4dit_pct"),
    "weight_range_method": ("minmax", "mse", "ptq4dit_pct"),
}
OF_METHODS = (  # choices that a method has or does not have
    "alpha", "search", "ssc", "shift", "scale", "num_groups", "linkage", "ema", "groups_per_layer",
)  # fmt: skip


def check_values(choices: dict[str, Any]) -> None:
    """A choice among few that is none of them is misuse."""
    for name, known in {"method": ("auto", *found_methods()), **VALUES}.items():
        value = choices[name]
        if value is not None and value not in known:
            raise typer.BadParameter(
                f"{option_of(name)} must be one of {', '.join(known)}, got {value!r}."
            )


def refuse_lost(method: str, chosen: dict[str, Any]) -> None:
    """A choice of other methods would be lost without a word.

    Args:
        method: that was chosen.
        chosen: choices that are not their defaults.
    """
    from ditq_converters.methods import METHODS

    for name in OF_METHODS:
        if name not in chosen or name in METHODS[method].option_names:
            continue
        owners = [other for other in BUILT_IN if name in METHODS[other].option_names]
        raise typer.BadParameter(
            f"{option_of(name)} is for {', '.join(owners)}, and the method is {method}; leave it out."
        )


def option_of(field: str) -> str:
    """The option that a command line has for a field of a recipe."""
    return "--groups" if field == "num_groups" else f"--{field.replace('_', '-')}"


def as_options(sentence: str, choices: dict[str, Any]) -> str:
    """A recipe's sentence about a field as one about the option that a command line has for it."""
    field, _, rest = sentence.removeprefix("recipe: ").removeprefix("option ").partition(" ")
    return f"{option_of(field)} {rest}" if field.rstrip(":") in choices else sentence


def refuse_choices(context: typer.Context, plan: Path | None, choices: Iterable[str]) -> None:
    """A plan holds every choice: others beside it would be lost without a word."""
    for name in choices if plan is not None else ():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"--plan holds every choice already, and {option_of(name)} was given too; change the plan with --set."
            )

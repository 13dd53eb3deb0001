"""`ditq plan`: decide about every site and linear, say why, and write it down to be read and changed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditq_converters.cli import choices as c
from ditq_converters.cli import options as o
from ditq_runtime.cli.output import print_table, say

if TYPE_CHECKING:
    from ditq_converters.plan.plan import Plan


@c.with_choices
def plan(
    model: o.ModelArgument,
    out: Annotated[Path, typer.Option(help="The plan, a JSON file with one entry per line.")],
    choices: dict[str, Any],
    set: c.SetOption = [],  # noqa: B006  typer needs a list default and does not mutate it
    stats: Annotated[
        Path | None, typer.Option(help="Check the plan against these statistics.")
    ] = None,
    inputs: o.SitesOption = None,
    json: o.JsonOption = False,
) -> None:
    """Write the plan of a conversion: per site and linear what happens to it, and why. Weights are read by auto alone.

    Read it, edit it, and run it with `ditq convert MODEL OUT --plan plan.json`.

    Example: ditq plan demo:digits --weights w4p --set '*.ff.net.2:weights=w8' --out plan.json
    """
    from ditq_converters.calibrate.stats import CalibrationStats
    from ditq_converters.models.open import open_model
    from ditq_converters.plan.check import check_statistics
    from ditq_converters.plan.file import to_json, write_plan
    from ditq_converters.plan.sizes import larger_than_eight_bits
    from ditq_converters.progress import note

    recipe = c.recipe_of(choices)
    known = None if stats is None else CalibrationStats.open(stats)
    if c.searches(choices):
        if known is None:
            asked = "--float-sites" if choices["float_sites"] else "--budget"
            raise typer.BadParameter(f"{asked} needs --stats; run `ditq calibrate` first.")
        made = c.searched(choices, open_model(model), known)
        for rule in set:
            made.set_rule(rule)
    else:
        opened = c.transformer_for(model, inputs, known)
        made = c.plan_for(opened, recipe, None, set)
        larger = larger_than_eight_bits(made, opened)
        if larger:
            note(larger)
    if known is not None:
        check_statistics(made, known)
    write_plan(made, out)
    if json:
        typer.echo(to_json(made), nl=False)
        return
    show_plan(made)
    c.tell_others(model)
    needs = {
        "ranges": made.needs_statistics,
        "sampled rows": made.needs_rows,
        "ranges of Q, K and V": made.needs_operands,
    }
    asked = ", ".join(name for name, needed in needs.items() if needed) or "nothing"
    say(f"{out}: {len(made.sites)} sites, {len(made.linears)} linears; statistics needed: {asked}")


def show_plan(plan: Plan) -> None:
    """What the entries have in common, and why."""
    sites = Counter(
        (entry.name.rpartition(".")[2], entry.method, entry.place, entry.reason)
        for entry in plan.sites
    )
    linears = Counter(
        (_form(entry.weights, entry.group_size), entry.activations, entry.reason)
        for entry in plan.linears
    )
    rows = [(count, *key) for key, count in sites.items()]
    print_table(f"sites of {plan.architecture}", ("count", "site", "method", "place", "why"), rows)
    lines = [(count, *key) for key, count in linears.items()]
    print_table("linears", ("count", "weights", "activations", "why"), lines)
    attention = Counter((str(e.format or "float"), e.reason) for e in plan.attention)
    for (form, reason), count in attention.items():
        say(f"attention of {count} modules: {form} ({reason})")


def _form(weights: str, group_size: int | None) -> str:
    return weights if group_size is None else f"{weights} in groups of {group_size}"

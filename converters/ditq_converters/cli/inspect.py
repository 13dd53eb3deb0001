"""`ditq inspect`: what would be folded and quantized in a float model; what a packed one holds and will run."""

from __future__ import annotations

from collections import Counter, defaultdict
from json import loads as parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ditq_converters.cli import choices as c
from ditq_converters.cli import options as o
from ditq_converters.cli.refusals import refuse_choices
from ditq_runtime.cli.output import mebibytes, print_json, print_table, say

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ditq_converters.plan.plan import Plan
    from ditq_runtime.families import Family
    from ditq_runtime.format.folder import TransformerFolder


@c.with_choices
def inspect(
    context: typer.Context,
    path: o.ModelArgument,
    choices: dict[str, Any],
    plan: c.PlanOption = None,
    set: c.SetOption = [],  # noqa: B006  typer needs a list default and does not mutate it
    inputs: o.SitesOption = None,
    verify: o.VerifyOption = False,
    json: o.JsonOption = False,
) -> None:
    """Show what `convert` would do to a float model, with coverage; or scheme, sizes and backend of a packed one.

    Example: ditq inspect demo:digits --weights w4p
    """
    from ditq_runtime.host.hub_cache import local

    path = local(path)
    if _is_packed(path):
        _show_packed(inspect_packed(path, verify), json)
        return
    if verify:
        raise typer.BadParameter(f"--verify: {path} is a float model, which has no digests.")
    refuse_choices(context, plan, c.CHOICES)
    recipe = c.recipe_of(choices)
    model = c.transformer_for(path, inputs, None)
    _show_float(inspect_float(model, c.plan_for(model, recipe, plan, set)), json)
    if not json:
        c.tell_others(path)


def inspect_float(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """A plan for a float model, with its coverage in parameters, FLOPs and bytes."""
    from ditq_converters.plan.coverage import coverage, parameters_of, planned_formats
    from ditq_converters.plan.sites import kind_of
    from ditq_converters.sites import family_or_row

    family = family_or_row(model)
    covered, formats = coverage(model, family, plan), planned_formats(model, plan)
    reasons = {site.name: site.reason for site in plan.sites}
    kinds = {
        f"{block}.{site.name}": kind_of(table, site)
        for block, table in family.block_tables(model).items()
        for site in table.sites
    }
    total = sum(p.numel() for p in model.parameters())
    layers: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "site": entry.site.rpartition(".")[2],
            "kind": kinds.get(entry.site, "-"),
            "format": getattr(formats[entry.name], "name", "float"),
            "fold": reasons.get(entry.site, entry.reason),
            "reason": entry.reason,
            "parameters": parameters_of(model, entry.name),
            "flops": covered.flops[entry.name] if covered.flops else None,
        }
        for entry in plan.linears
    ]
    quantized = sum(e["parameters"] for e in layers if e["format"] not in ("float", "fp32"))
    return {
        "architecture": type(model).__name__,
        "parameters": total,
        "quantized_parameters_share": quantized / total,
        "integer_flops_share": covered.integer_flops_share,
        "tokens": covered.tokens,
        "float_bytes": covered.float_bytes,
        "packed_bytes": covered.packed_bytes,
        "layers": layers,
        "others": [
            {"name": name, "parameters": model.get_parameter(name).numel(), "reason": why}
            for name, why in _others(model, family).items()
        ],
        "attention": [
            {"name": entry.name, "format": str(entry.format or "float"), "reason": entry.reason}
            for entry in plan.attention
        ],
    }


def _others(model: nn.Module, family: Family) -> dict[str, str]:
    """Parameters that a family keeps float and that are no linear's, by full name: weights of all experts."""
    parameters = dict(model.named_parameters())
    return {name: why for name, why in family.kept.items() if name in parameters}


def inspect_packed(path: str, verify: bool = False) -> dict[str, Any]:
    """Scheme, sizes and backends of a packed folder, from its headers alone; with `verify` its tensors are read too.

    Of a pipeline with several packed transformers that of the first; the others stand in it under their names.
    """
    from ditq_runtime.format.folder import transformer_folders
    from ditq_runtime.host import verify as digests

    first, *others = (
        (name, _packed_report(folder))
        for name, folder in transformer_folders(path).items()
        if folder.scheme is not None
    )
    return {**first[1], "verified": digests.verify(path) if verify else None, **dict(others)}


def _packed_report(folder: TransformerFolder) -> dict[str, Any]:
    import torch

    from ditq_runtime.host.loadable import check_loadable
    from ditq_runtime.host.sizes import size_by_category

    check_loadable(folder)
    scheme = folder.scheme
    assert scheme is not None
    assert folder.quantization is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    formats = []
    for name, layer_format in scheme.formats.items():
        formats.append(
            {
                "format": name,
                "layers": sum(used == name for used in scheme.layers.values()),
                "runs": _runs(layer_format.ops, device) or "float (torch)",
            }
        )
    return {
        "architecture": scheme.architecture,
        "shared_embedder": scheme.shared_embedder,
        "recipe": folder.quantization.get("recipe", {}),
        "device": str(device),
        "formats": formats,
        "attention": [
            {
                "format": str(attention_format),
                "modules": sum(used == attention_format for used in scheme.attention.values()),
                "runs": _runs(attention_format.ops, device),
            }
            for attention_format in sorted(set(scheme.attention.values()), key=str)
        ],
        "bytes_by_category": size_by_category(folder),
        "bytes": folder.nbytes,
        "tensors": len(folder.headers),
    }


def _runs(ops: tuple[str, ...], device: torch.device) -> str:
    import ditq_kernels as k

    return " + ".join(f"{op} ({k.backend_of(op, device)})" for op in ops)


def _is_packed(path: str) -> bool:
    """Whether a folder's config.json says so; a damaged one counts, as `open_folder` names what is wrong with it."""
    folder = Path(path)
    inside = folder / "transformer" if (folder / "model_index.json").exists() else folder
    config = inside / "config.json"
    if not config.is_file():
        return config.exists()
    try:
        parsed = parse(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return True
    return not isinstance(parsed, dict) or parsed.get("quantization_config") is not None


def _show_float(report: dict[str, Any], json: bool) -> None:
    if json:
        print_json(report)
        return
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for layer in report["layers"]:
        key = tuple(layer[field] for field in ("site", "kind", "format", "fold"))
        groups[key].append(layer)
    total, flops = report["parameters"], sum(e["flops"] or 0 for e in report["layers"])
    rows = [
        (
            *(site, kind, len(members), form),
            100 * sum(m["parameters"] for m in members) / total,
            100 * sum(m["flops"] for m in members) / flops if flops else "?",
            fold,
        )
        for (site, kind, form, fold), members in groups.items()
    ]
    print_table(
        f"fold plan of {report['architecture']}",
        ("site", "kind", "linears", "format", "% params", "% flops", "factor"),
        rows,
    )
    for (form, reason), count in Counter(
        (entry["format"], entry["reason"]) for entry in report["attention"]
    ).items():
        say(f"attention of {count} modules: {form}{f' ({reason})' if reason else ''}")
    for reason, count in Counter(entry["reason"] for entry in report["others"]).items():
        size = sum(e["parameters"] for e in report["others"] if e["reason"] == reason)
        say(f"{count} tensors with {size:,} parameters: {reason}")
    say(
        f"{100 * report['quantized_parameters_share']:.1f} % of {total:,} parameters become integers; "
        f"{mebibytes(report['float_bytes'])} in bf16, {mebibytes(report['packed_bytes'])} packed"
    )
    if flops:
        share = 100 * report["integer_flops_share"]
        say(
            f"{share:.1f} % of the linear FLOPs of a forward with {report['tokens']} tokens are integer x integer; "
            "--json lists every linear"
        )


def _show_packed(report: dict[str, Any], json: bool) -> None:
    if json:
        print_json(report)
        return
    recipe = report["recipe"]
    say(
        f"{report['architecture']}, packed with {recipe.get('method', 'unknown')} by ditq {recipe.get('ditq', '?')}"
    )
    rows = [(f["format"], f["layers"], f["runs"]) for f in report["formats"]]
    print_table(
        f"what will run on {report['device']}", ("format", "linears", "ops (backend)"), rows
    )
    for entry in report["attention"]:
        say(f"attention of {entry['modules']} modules: {entry['format']}: {entry['runs']}")
    if report.get("verified") is not None:
        count = report["verified"]
        say(f"{count} tensors have their digests" if count else "it holds no digests to verify by")
    sizes = [(name, mebibytes(size)) for name, size in report["bytes_by_category"].items() if size]
    print_table("on disk", ("category", "size"), [*sizes, ("total", mebibytes(report["bytes"]))])
    for name, other in report.items():
        if name.startswith("transformer_"):
            say(f"{name}:")
            _show_packed(other, json)

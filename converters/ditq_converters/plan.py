"""Which format every linear gets under a recipe, and why: what `inspect` prints and `convert` runs."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

from torch import nn

import ditq_kernels as k
from ditq_converters.methods import METHODS
from ditq_converters.recipe import Recipe
from ditq_runtime.families import AdaLN, Family, OnTheFly, Site, ValueRows, get_linear
from ditq_runtime.scheme import LayerFormat

KIND = {AdaLN: "K1", ValueRows: "V", OnTheFly: "G"}


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one linear.

    Attributes:
        name: module name.
        site: name of its input in the family table; `modulation` or `outside the blocks` otherwise.
        kind: fold kind K1, V, G, or `-`.
        format: None if the module stays as it is.
        fold: where its smoothing factor goes, or why there is none.
        parameters: number of weights and biases.
    """

    name: str
    site: str
    kind: str
    format: LayerFormat | None
    fold: str
    parameters: int


def plan_layers(model: nn.Module, family: Family, recipe: Recipe) -> list[LayerPlan]:
    """One entry per linear of the model, blocks first.

    Raises:
        ValueError: a `--keep` pattern matches nothing, or a layer cannot have the recipe's weights.
    """
    plans = []
    for block in family.block_names(model):
        for site in family.sites:
            smooth = transforms(recipe, block, site)
            plans += [
                _consumer(model, f"{block}.{name}", site, recipe, smooth) for name in site.consumers
            ]
        plans += [_modulation(model, f"{block}.{name}", recipe) for name in family.modulations]
    known = {plan.name for plan in plans}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in known:
            reason = next(
                (why for part, why in family.kept.items() if part in name),
                "no site in the family table",
            )
            plans.append(
                LayerPlan(name, "outside the blocks", "-", None, reason, _parameters(module))
            )
    _check_keep(recipe, [plan.name for plan in plans if plan.format is not None])
    return plans


def transforms(recipe: Recipe, block: str, site: Site) -> bool:
    """Whether a method may transform a site: it has a transform, and some consumer is quantized."""
    method = METHODS[recipe.method]
    kept = all(recipe.keeps(f"{block}.{name}") for name in site.consumers)
    reached = method.on_the_fly or not isinstance(site.producer, OnTheFly)
    return method.transform is not None and reached and not kept


def _consumer(model: nn.Module, name: str, site: Site, recipe: Recipe, smooth: bool) -> LayerPlan:
    linear = get_linear(model, name)
    on_the_fly = isinstance(site.producer, OnTheFly) and smooth
    bias = linear.bias is not None
    if recipe.keeps(name):
        layer_format = LayerFormat("fp32", "none", bias=bias)
    else:
        group = _group_size(name, linear, recipe.weights, recipe.group_size)
        layer_format = LayerFormat(
            recipe.weights, recipe.activations, group, on_the_fly, bias, lora_rank=recipe.rank
        )
    kind = KIND[type(site.producer)]
    return LayerPlan(name, site.name, kind, layer_format, _where(site, smooth), _parameters(linear))


def _modulation(model: nn.Module, name: str, recipe: Recipe) -> LayerPlan:
    linear = get_linear(model, name)
    weights = "fp32" if recipe.keeps(name) else recipe.modulation_weights
    group = _group_size(name, linear, weights, recipe.group_size)
    layer_format = LayerFormat(weights, "none", group, bias=True)
    return LayerPlan(
        name,
        "modulation",
        "-",
        layer_format,
        "weight-only; emits the AdaLN multiplier",
        _parameters(linear),
    )


def _where(site: Site, smooth: bool) -> str:
    if not smooth:
        return "no transform"
    match site.producer:
        case AdaLN(modulation):
            return f"into the AdaLN rows of {modulation}"
        case ValueRows(value):
            return f"through V, into the rows of {value}"
        case OnTheFly(reason):
            return f"on the fly: {reason}"


def _group_size(name: str, linear: nn.Linear, weights: str, requested: int) -> int | None:
    if weights != "w4p":
        return None
    try:
        return k.resolve_group_size(linear.in_features, requested)
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}; keep it float with --keep '{name}' or use --weights w8"
        ) from error


def _parameters(linear: nn.Module) -> int:
    return sum(p.numel() for p in linear.parameters(recurse=False))


def _check_keep(recipe: Recipe, names: list[str]) -> None:
    for pattern in recipe.keep:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(
                f"--keep {pattern!r} matches none of the {len(names)} quantized linears; see `ditq inspect`"
            )

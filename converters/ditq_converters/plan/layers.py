"""Which format every linear gets under a recipe, and why: what `inspect` prints and `convert` runs."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

from torch import nn

import ditq_kernels as k
from ditq_converters.convert.attention import plan_attention
from ditq_converters.methods import METHODS
from ditq_converters.plan.recipe import Recipe
from ditq_runtime.families import (
    AdaLN,
    BlockTable,
    Family,
    NormWeights,
    OnTheFly,
    ProductRows,
    Site,
    ValueRows,
    get_linear,
)
from ditq_runtime.format.layer import GROUPED, LayerFormat


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one linear.

    Attributes:
        name: module name.
        site: name of its input in the family table; `modulation` or `outside the table` otherwise.
        kind: fold kind K1 (AdaLN), K2 (AdaLN with a shared projection), V, V|G, G, X, or `-`.
        format: None if the module stays as it is.
        fold: where its smoothing factor goes, or why there is none.
        parameters: number of weights and biases.
        in_features: K.
        out_features: N.
    """

    name: str
    site: str
    kind: str
    format: LayerFormat | None
    fold: str
    parameters: int
    in_features: int
    out_features: int


def plan_layers(model: nn.Module, family: Family, recipe: Recipe) -> list[LayerPlan]:
    """One entry per linear of the model, blocks first.

    Raises:
        ValueError: a `--keep` pattern matches nothing, or a layer cannot have the recipe's weights, or an attention
            the recipe's format.
    """
    plans = []
    for block, table in family.block_tables(model).items():
        for site in table.sites:
            smooth = transforms(recipe, block, site)
            plans += [
                _consumer(model, block, name, table, site, recipe, smooth)
                for name in site.consumers
            ]
        plans += [
            _modulation(model, f"{block}.{name}", table, recipe) for name in table.modulations
        ]
    if family.final_modulation is not None:
        plans.append(_final_modulation(model, family.final_modulation, recipe))
    known = {plan.name for plan in plans}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in known:
            why = family.why_kept(name)
            plans.append(_plan(module, name, "outside the table", "-", None, why))
    names = [plan.name for plan in plans if plan.format is not None]
    attention = plan_attention(model, family, recipe)
    if recipe.attention_format is not None:
        names += [plan.name for plan in attention]
    _check_keep(recipe, names)
    return plans


def transforms(recipe: Recipe, block: str, site: Site) -> bool:
    """Whether a method may transform a site: it has a transform, and some consumer is quantized."""
    method = METHODS[recipe.method]
    kept = all(recipe.keeps(f"{block}.{name}") for name in site.consumers)
    reached = method.on_the_fly or not isinstance(site.producer, OnTheFly)
    return method.transform is not None and reached and not kept


def kind_of(table: BlockTable, site: Site) -> str:
    """Fold kind of a site, as `ditq inspect` names it."""
    match site.producer:
        case AdaLN(modulation):
            return "K2" if modulation in table.tables else "K1"
        case ValueRows(_, rest):
            return "V" if rest is None else "V|G"
        case NormWeights():
            return "K5"
        case ProductRows():
            return "M"
        case OnTheFly(_, kind):
            return kind


def _consumer(
    model: nn.Module,
    block: str,
    consumer: str,
    table: BlockTable,
    site: Site,
    recipe: Recipe,
    smooth: bool,
) -> LayerPlan:
    name = f"{block}.{consumer}"
    linear = get_linear(model, name)
    bias = linear.bias is not None
    if recipe.keeps(name):
        layer_format = LayerFormat("fp32", "none", bias=bias)
    else:
        group = _group_size(name, linear, recipe.weights, recipe.group_size)
        layer_format = LayerFormat(
            recipe.weights, recipe.activations, group, bias, lora_rank=recipe.rank
        )
    where = _where(site, recipe) if smooth else "no transform"
    return _plan(linear, name, site.name, kind_of(table, site), layer_format, where)


def _modulation(model: nn.Module, name: str, table: BlockTable, recipe: Recipe) -> LayerPlan:
    linear = get_linear(model, name)
    weights = "fp32" if recipe.keeps(name) else recipe.modulation_weights
    group = _group_size(name, linear, weights, recipe.group_size)
    direct = table.use_direct_multiplier is not None
    layer_format = LayerFormat(weights, "none", group, bias=direct or linear.bias is not None)
    what = "weight-only; " + ("emits the AdaLN multiplier" if direct else "one row per sample")
    return _plan(linear, name, "modulation", "-", layer_format, what)


def _final_modulation(model: nn.Module, name: str, recipe: Recipe) -> LayerPlan:
    linear = get_linear(model, name)
    weights = "fp32" if recipe.keeps(name) else "w8"
    layer_format = LayerFormat(weights, "none", bias=linear.bias is not None)
    what = "weight-only, in 8 bits: no block follows; one row per sample"
    return _plan(linear, name, "modulation", "-", layer_format, what)


def _plan(
    linear: nn.Linear,
    name: str,
    site: str,
    kind: str,
    layer_format: LayerFormat | None,
    fold: str,
) -> LayerPlan:
    parameters = sum(p.numel() for p in linear.parameters(recurse=False))
    shape = linear.in_features, linear.out_features
    return LayerPlan(name, site, kind, layer_format, fold, parameters, *shape)


def _where(site: Site, recipe: Recipe) -> str:
    match site.producer:
        case AdaLN(modulation):
            return f"into the AdaLN rows of {modulation}"
        case ValueRows(values, rest):
            through = f"through V, into the rows of {', '.join(values)}"
            if rest is None:
                return through
            left = "on the fly" if METHODS[recipe.method].on_the_fly else "none"
            return f"{through}; the other channels {left}: {rest}"
        case OnTheFly(reason):
            return f"on the fly: {reason}"
        case NormWeights(norm):
            return f"into the weights of {norm}"
        case ProductRows(linear):
            return f"into the rows of {linear}"


def _group_size(name: str, linear: nn.Linear, weights: str, requested: int) -> int | None:
    if weights not in GROUPED:
        return None
    try:
        return k.resolve_group_size(linear.in_features, requested, one_group=weights == "w4g")
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}; keep it float with --keep '{name}' or use --weights w8"
        ) from error


def _check_keep(recipe: Recipe, names: list[str]) -> None:
    for pattern in recipe.keep:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(
                f"--keep {pattern!r} matches none of the {len(names)} quantized modules; see `ditq inspect`"
            )

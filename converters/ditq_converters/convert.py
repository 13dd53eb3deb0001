"""Convert: from a float pipeline to a packed one. Reads in the order it runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq_converters.fold import block_linears, fold_block, weight_absmax
from ditq_converters.methods import METHODS, SiteData
from ditq_converters.models import transformer_of
from ditq_converters.pack import make_scheme, pack_model
from ditq_converters.pipeline_folder import write_pipeline
from ditq_converters.plan import LayerPlan, plan_layers, smooths
from ditq_converters.progress import progress_bar
from ditq_converters.quantize import quantize_linear, static_range
from ditq_converters.recipe import Recipe
from ditq_converters.stats import CalibrationStats
from ditq_runtime.families import Family, family_of
from ditq_runtime.files import check_new


def convert(
    pipe: Any,
    recipe: Recipe,
    stats: CalibrationStats | None = None,
    out: str | Path | None = None,
    max_shard_size: str = "10GB",
    quiet: bool = False,
) -> nn.Module:
    """Turn a float model into a packed checkpoint.

    Args:
        pipe: a diffusers pipeline, or its transformer alone; not changed.
        recipe: every choice.
        stats: a calibration of this very model; needed by static activations and by methods that smooth.
        out: folder to write, a pipeline or a transformer as `pipe` is; it appears complete or not at all.
        max_shard_size: as in diffusers' `save_pretrained`.
        quiet: show no progress bar.

    Returns:
        The packed transformer, in memory.

    Raises:
        ValueError: an unsupported model, missing statistics, a layer that cannot have the recipe's format, a tensor
            that is not finite.
        StatisticsError: the statistics are of another model, incomplete or damaged.
        FileExistsError: `out` is in use.
    """
    if out is not None:
        check_new(Path(out))
    model = transformer_of(pipe)
    family = family_of(type(model).__name__)
    plans = plan_layers(model, family, recipe)
    check_finite(model)
    if stats is not None:
        stats.check_model(model)
    elif recipe.needs_statistics:
        raise ValueError(
            f"convert: method {recipe.method} with {recipe.activations} activations needs statistics; "
            "run `ditq calibrate` first and pass them"
        )
    scheme = make_scheme(model, family, plans)
    tensors: dict[str, torch.Tensor] = {}
    by_name = {plan.name: plan for plan in plans}
    blocks = family.block_names(model)
    with torch.no_grad(), progress_bar("converting", len(blocks), quiet=quiet) as advance:
        for block in blocks:
            tensors |= convert_block(model, family, block, recipe, stats, by_name)
            advance()
        packed = pack_model(model, scheme, tensors, provenance(recipe, stats))
    if out is not None:
        save(pipe, packed, Path(out), max_shard_size)
    return packed


def check_finite(model: nn.Module) -> None:
    """ValueError that names the first tensor of a float model with a NaN or an infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name}: holds a value that is not finite; check the source checkpoint"
            )


def convert_block(
    model: nn.Module,
    family: Family,
    block: str,
    recipe: Recipe,
    stats: CalibrationStats | None,
    plans: dict[str, LayerPlan],
) -> dict[str, torch.Tensor]:
    """The stored tensors of one block: statistics -> factors -> fold (exact) -> quantize (lossy)."""
    linears = block_linears(model.get_submodule(block), family)
    smooth, act_range = {}, {}
    method = METHODS[recipe.method]
    for site in family.sites:
        ranges = stats.ranges(f"{block}.{site.name}") if stats and recipe.needs_statistics else None
        if smooths(recipe, block, site):
            assert method.smooth is not None
            assert ranges is not None
            smooth[site.name] = method.smooth(
                SiteData(*ranges, weight_absmax(linears, site)), recipe.alpha
            )
        if recipe.activations == "static":
            assert ranges is not None
            act_range.update(
                dict.fromkeys(site.consumers, static_range(*ranges, smooth.get(site.name)))
            )
    smooth_inv = fold_block(linears, family, smooth)
    tensors = {}
    for name, linear in linears.items():
        layer_format = plans[f"{block}.{name}"].format
        assert layer_format is not None
        stored = quantize_linear(linear, layer_format, act_range.get(name), smooth_inv.get(name))
        tensors.update({f"{block}.{name}.{field}": tensor for field, tensor in stored.items()})
    return tensors


def provenance(recipe: Recipe, stats: CalibrationStats | None) -> dict[str, Any]:
    """What `config.json` keeps of how the checkpoint was made."""
    made: dict[str, Any] = {
        **recipe.to_dict(),
        "source": METHODS[recipe.method].source,
        "ditq": ditq_version(),
    }
    if stats is not None:
        kept = ("calls", "sampler", "model_hash")
        made["calibration"] = {key: stats.manifest[key] for key in kept}
        made["calibration"]["guidance"] = stats.manifest["plan"]["guidance"]
        made["calibration"]["samples"] = len(stats.manifest["plan"]["labels"])
    return made


def ditq_version() -> str:
    """Version of the installed distribution; "source" when run from a source tree."""
    try:
        return version("ditq")
    except PackageNotFoundError:
        return "source"


def save(pipe: Any, packed: Any, out: Path, max_shard_size: str) -> None:
    """Write the packed transformer, inside a copy of its pipeline where there is one, atomically."""
    if isinstance(pipe, nn.Module):
        write_pipeline(packed, out, max_shard_size)
        return
    components = {**pipe.components, "transformer": packed}
    write_pipeline(type(pipe)(**components), out, max_shard_size, labels_of=pipe)

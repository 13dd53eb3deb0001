"""Assemble stored tensors into a packed transformer. Lossless: bits move, values do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ditq_converters.streaming.model import tensors_of
from ditq_runtime.families import Family
from ditq_runtime.families.placing import Shapes, placed_sites
from ditq_runtime.format.attention import AttentionFormat
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.host import plugin, skeleton
from ditq_runtime.host.config import DitqConfig
from ditq_runtime.layers.timestep_freq import get_timestep_freq


def make_scheme(
    model: nn.Module,
    family: Family,
    formats: dict[str, LayerFormat],
    shapes: Shapes,
    attention: dict[str, AttentionFormat] | None = None,
) -> Scheme:
    """The scheme of full layer name -> format, stored tensor -> shape, full attention name -> format.

    The model's weights may be on disk.
    """

    def module(prefix: str) -> dict[str, torch.Tensor]:
        tensors = tensors_of(model, prefix)
        return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors}

    shared = skeleton.has_shared_embedder(model, family, module)
    sites = placed_sites(model, family, formats, shapes)
    scheme = Scheme.of(type(model).__name__, shared, formats, sites, attention)
    timestep = family.timestep_argument or "timestep"
    return replace(scheme, timestep=timestep, timestep_freq=get_timestep_freq(model))


def pack_model(
    model: Any,
    scheme: Scheme,
    tensors: dict[str, torch.Tensor],
    recipe: dict[str, Any],
    kept_dtype: str = "fp32",
) -> nn.Module:
    """Build the packed transformer: stored tensors for the listed layers, the float model's for the rest.

    Args:
        model: the float transformer; not changed.
        scheme: what to build.
        tensors: full name -> tensor for every tensor of every listed layer and folded modulation table.
        recipe: provenance, stored beside the scheme.
        kept_dtype: of what stays float, and of activations: `fp32`, as `model` has it, or `bf16`.

    Returns:
        A transformer on the CPU that runs and that `save_pretrained` writes.
    """
    packed = packed_skeleton(model, scheme, recipe, kept_dtype)
    for name, buffer in packed.named_buffers():
        if buffer.is_floating_point():
            buffer.data = model.get_buffer(name).detach().cpu().to(buffer.dtype, copy=True)
    expected = packed.state_dict()
    replaced = {name.rpartition(".")[0] for name in tensors}
    floats = {
        n: t.detach().cpu().to(expected[n].dtype, copy=True)
        for n, t in model.state_dict().items()
        if n not in replaced and n.rpartition(".")[0] not in replaced
    }
    made = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    packed.load_state_dict({**floats, **made}, strict=True, assign=True)
    packed.requires_grad_(False).eval()
    return packed


def packed_skeleton(
    model: Any, scheme: Scheme, recipe: dict[str, Any], kept_dtype: str = "fp32"
) -> Any:
    """The packed transformer before it has its tensors: they are on meta. Arguments as `pack_model`."""
    dtype = stored_dtype(model, kept_dtype)
    config = {key: value for key, value in model.config.items() if key != "_name_or_path"}
    with init_empty_weights():
        packed = type(model).from_config(config)
    wide = packed._keep_in_fp32_modules or []
    floats = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    for name, tensor in packed.state_dict(keep_vars=True).items():
        if name in floats:
            kept = any(part in name.split(".") for part in wide)
            tensor.data = tensor.data.to(floats[name].dtype if kept else dtype)
    skeleton.install(packed, scheme, dtype)
    plugin.adopt(packed, DitqConfig(scheme, recipe), dtype)
    return packed


def stored_dtype(model: nn.Module, kept_dtype: str) -> torch.dtype:
    """The type of what stays float."""
    return torch.bfloat16 if kept_dtype == "bf16" else next(model.parameters()).dtype

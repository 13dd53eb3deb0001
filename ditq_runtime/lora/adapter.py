"""Low-rank adapters of the float model on a packed one, exact also where a factor was folded away.

A folded linear reads x' = (x - z_g) u with u = 1 / s, and its rows may have been scaled for a consumer. The float
model's update B A x is therefore applied as

    diag(u_out) B (A diag(s)) x'  +  diag(u_out) B A z_g        u_out: rows scaled for a consumer, else 1

PEFT would feed x' to A, silently wrong: `ditq_runtime.host.guards` refuses it on folded linears.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.site import Site
from ditq_runtime.lora.branch import ADAPTERS, Adapters, LoraBranch, add_branches
from ditq_runtime.lora.file import Adapter, LoraFile, read_adapters
from ditq_runtime.lora.switch import (
    check_name,
    check_not_graphed,
    let_run,
    packed_model,
    running_names,
    tell_diffusers,
    text_encoders_of,
)


def load_lora(
    target: Any,
    source: str | Path | Mapping[str, torch.Tensor],
    name: str = "default",
    scale: float = 1.0,
    replace: bool = False,
) -> list[str]:
    """Add a LoRA that was trained on the float model to a packed transformer.

    The adapter stays beside the integer weights, in the compute dtype; `save_pretrained` does not write it. Load it
    before offloading. What torch has compiled in this process is compiled again after it, but not after `replace`.
    The verbs of diffusers (`set_adapters`, `disable_lora`, `unload_lora_weights`, ...) act on it where the model's
    class has them, and need PEFT; `set_lora` and `unload_lora` need nothing.

    Args:
        target: a pipeline with a packed `transformer`, or the transformer; compiled or not.
        source: a `.safetensors` file, a folder written by PEFT or diffusers, or a state dict. Tensors of text encoders
            are handed to those of the pipeline.
        name: to switch and unload it by.
        scale: multiplies the adapter's own alpha / r.
        replace: put it in the place of the adapter of that name, at the same addresses: its rank may not be higher,
            nor may it reach linears that the other does not; linears that it leaves out get zeros.

    Returns:
        The names of the linears that gained a branch.

    Raises:
        ValueError: the model is not packed, is offloaded, or replays a CUDA graph; a name in use, or none to replace;
            a layer that the model lacks or that has other sizes; anything that is not a plain LoRA. Nothing is
            changed then.
    """
    model = packed_model(target, "load_lora")
    check_name(name, scale)
    return attach(target, model, read_adapters(source), name, scale, replace)


def attach(
    target: Any,
    model: Any,
    file: LoraFile,
    name: str,
    scale: float,
    replace: bool,
    alone: bool = False,
) -> list[str]:
    """`load_lora` of what was read, checked before anything is changed; it runs `alone`, or with those that run."""
    check_not_graphed(model, "load_lora")
    give_text = text_encoders_of(target, file, name, scale)
    folds = [m for m in model.modules() if isinstance(m, Site) and m.format.is_folded]
    linears: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    branches: dict[str, LoraBranch] = {}
    for layer, adapter in file.adapters.items():
        linear = linears.get(layer)
        _check(layer, linear, adapter, None if replace else name)
        branches[layer] = _branch(folds, layer, linear, adapter, scale)
    if replace:
        _replace(linears, branches, name)
        return list(branches)
    taken = getattr(model, "peft_config", {})
    if name in taken:
        raise ValueError(
            f"load_lora: PEFT has an adapter {name!r} on this model; choose another name"
        )
    rank = (getattr(model, "_prepare_lora_hotswap_kwargs", None) or {}).get("target_rank", 0)
    running = [] if alone else running_names(model)
    for layer, branch in branches.items():
        branch.widen(rank)
        adapters_of(linears[layer]).add(name, branch)
    let_run(model, [*running, name])
    tell_diffusers(model, name, file.adapters)
    give_text()
    return list(branches)


def adapters_of(linear: Any) -> Adapters:
    """What holds a linear's branches, made at the first."""
    if not hasattr(linear, ADAPTERS):
        setattr(linear, ADAPTERS, Adapters())
        linear.register_forward_hook(add_branches)
    adapters: Adapters = getattr(linear, ADAPTERS)
    return adapters


def _replace(linears: dict[str, Any], branches: dict[str, LoraBranch], name: str) -> None:
    """Put branches in the place of those of one name; refused before any is changed."""
    held: dict[str, Any] = {
        layer: getattr(linear, ADAPTERS)[name]
        for layer, linear in linears.items()
        if name in getattr(linear, ADAPTERS, ())
    }
    if not held:
        raise ValueError(f"load_lora: there is no adapter {name!r} to replace; load it without")
    for layer, branch in branches.items():
        if layer not in held:
            raise ValueError(
                f"load_lora: {layer} has no branch of {name!r} to replace; unload that, and load this one"
            )
        rank, room = len(branch.down), len(held[layer].down)
        if rank > room or (branch.bias is not None and held[layer].bias is None):
            raise ValueError(
                f"load_lora: {layer} has rank {rank}, and what {name!r} holds has room for {room}; call "
                "enable_lora_hotswap(target_rank=...) before the first, or unload it and load this one"
            )
    for layer, branch in held.items():
        branch.replace(branches.get(layer))


def _branch(
    folds: list[Site], layer: str, linear: Any, adapter: Adapter, scale: float
) -> LoraBranch:
    """The folded adapter, in the dtype and on the device of its linear."""
    strength = adapter.strength * scale
    down, up = adapter.down, adapter.up * strength
    bias = None if adapter.bias is None else adapter.bias[None] * strength
    for site in folds:
        if layer in site.format.readers:
            down, bias = _of_reader(site, down, up, bias)
    for site in folds:
        if layer in site.format.producers and site.scale is not None:
            rows = row_factors(site, site.format.producers[layer], len(up))
            up, bias = up * rows[:, None], None if bias is None else bias * rows
    device, dtype = linear.weight.device, linear.weight.dtype
    if isinstance(linear, QuantLinear):
        dtype = torch.float32 if linear.wide_output else linear.compute_dtype
    if bias is not None:
        bias = (bias[0] if len(bias) == 1 else bias).to(device, torch.float32)
    down, up = down.to(device, dtype), up.to(device, dtype)
    for tensor in (down, up):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"load_lora: {layer} has values that {dtype} cannot hold; load the model in another dtype"
            )
    return LoraBranch(down, up, bias)


def _of_reader(
    site: Site, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Down [r, K] and bias [1 or S, N] of the adapter of a linear that reads a folded site; all fp64."""
    if site.fold_shift is not None:
        term = site.fold_shift.double().cpu() @ down.t() @ up.t()  # B A z_g, [S, N]
        bias = term if bias is None else bias + term
    return (down if site.scale is None else down * site.scale.double().cpu()), bias


def row_factors(site: Site, begins: tuple[int, ...], num_rows: int) -> torch.Tensor:
    """[N] fp64: what the fold of a site multiplied each row of a producer by."""
    assert site.scale is not None
    u, rows = 1 / site.scale.double().cpu(), torch.ones(num_rows, dtype=torch.float64)
    for begin in begins:
        part = rows[begin : begin + len(u)]
        part.copy_(u[: len(part)])
    return rows


def _check(layer: str, linear: Any, adapter: Adapter, name: str | None) -> None:
    if hasattr(linear, "base_layer"):
        raise ValueError(
            f"load_lora: {layer} has an adapter of PEFT around it; unload that one, then load each with load_lora"
        )
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"load_lora: {layer} is no linear of the model; was the adapter trained on another architecture?"
        )
    sizes = (linear.in_features, linear.out_features)
    if (adapter.down.shape[1], adapter.up.shape[0]) != sizes:
        raise ValueError(
            f"load_lora: {layer} has K, N = {sizes}, but the adapter is for "
            f"{(adapter.down.shape[1], adapter.up.shape[0])}"
        )
    if name in getattr(linear, ADAPTERS, {}):
        raise ValueError(
            f"load_lora: an adapter {name!r} is loaded; choose another name or unload_lora it"
        )
    hook = getattr(linear, "_hf_hook", None)
    if (
        linear.weight.is_meta
        or getattr(hook, "offload", False)
        or hasattr(linear, "_diffusers_hook")
    ):
        raise ValueError(
            f"load_lora: {layer} is offloaded; load the adapter first, then switch offloading on"
        )

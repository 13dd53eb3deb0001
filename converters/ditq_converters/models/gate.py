"""The door of the converters: which states of a model that is handed in they cannot work on, one sentence each.

A model that somebody else's tool has changed looks like the float model, and gives other numbers, or none: what is
recorded or read of it would be wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ditq_converters.streaming.model import streamed_of
from ditq_runtime.layers.linear import QuantLinear

FP8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
)


def _is_packed(model: Any) -> bool:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return bool(config) or any(isinstance(m, QuantLinear) for m in model.modules())


def _of_peft(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


def _is_offloaded(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # accelerate's list of several
    return any(getattr(one, "offload", False) for one in hooks)


def _is_grouped(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return any("group_offloading" in name for name in getattr(registry, "hooks", ()))


def _any(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda model: any(test(module) for module in model.modules())


# what it is -> what to do; the first that holds is said
STATES: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        lambda model: hasattr(model, "_orig_mod"),
        "is wrapped by torch.compile; pass the model inside of it, its _orig_mod",
    ),
    (
        _any(lambda m: m._compiled_call_impl is not None),
        "is compiled, and compiled code calls no hooks; load it again without .compile()",
    ),
    (_is_packed, "is quantized already; give the float model it was made from"),
    (
        _any(lambda m: _of_peft(m) and bool(getattr(m, "merged", False))),
        "has a fused adapter still attached; unload_lora_weights() leaves it in the weights",
    ),
    (
        _any(_of_peft),
        "has an adapter attached; call fuse_lora() and unload_lora_weights() to convert it with the adapter, "
        "unload_lora_weights() alone to convert it without",
    ),
    (
        _any(lambda m: bool(getattr(m, "fused_projections", False))),
        "has fused QKV projections; call unfuse_qkv_projections(), its weights are read one by one",
    ),
    (
        _any(lambda m: _is_offloaded(m) or _is_grouped(m)),
        "is offloaded, so that its weights are elsewhere between calls; load it without offloading, or give its folder "
        "and a memory budget",
    ),
    (
        lambda model: any(p.dtype in FP8 for p in model.parameters()),
        "is cast to fp8 between calls (enable_layerwise_casting); load it without, its weights are rounded",
    ),
)

WITHOUT_WEIGHTS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        lambda model: streamed_of(model) is None and any(p.is_meta for p in model.parameters()),
        "has no weights: some are on the meta device; load them",
    ),
)


def float_transformer(pipe: Any, caller: str, needs_weights: bool = True) -> nn.Module:
    """The float transformer of a pipeline, or a transformer, in a state that it can be read and recorded in.

    Args:
        pipe: what was handed in.
        caller: whose refusal it would be.
        needs_weights: False where its shape is enough.

    Raises:
        ValueError: it holds no transformer, or one in another state; the sentence says what to do.
    """
    model = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "transformer", None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{caller}: {type(pipe).__name__} has no transformer; expected a diffusers pipeline or its transformer"
        )
    for holds, sentence in (*STATES, *WITHOUT_WEIGHTS) if needs_weights else STATES:
        if holds(model):
            name = type(getattr(model, "_orig_mod", model)).__name__
            raise ValueError(f"{caller}: the {name} {sentence}")
    return model

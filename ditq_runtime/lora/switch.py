"""Switch and unload adapters, and what they share with diffusers: names, text encoders, compiled code."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from inspect import getclosurevars
from numbers import Real
from typing import Any

import torch
from torch import nn

from ditq_runtime.layers.carrier import REPLAYS
from ditq_runtime.lora.branch import ADAPTERS, Adapters, add_branches
from ditq_runtime.lora.file import Adapter, LoraFile

ATTENTION_KWARGS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")


def set_lora(target: Any, weights: Mapping[str, float]) -> None:
    """Choose which of the adapters that `load_lora` added run, and how strongly.

    Args:
        target: as given to `load_lora`.
        weights: name -> factor of the adapter; those that are not named do not run, none with {}.

    Raises:
        ValueError: no adapter has a name, or a factor is not finite. Nothing is changed then.
    """
    model = packed_model(target, "set_lora")
    check_not_graphed(model, "set_lora")
    known = names_of(model)
    for name, weight in weights.items():
        number = isinstance(weight, Real) and math.isfinite(weight)
        if name not in known or not number:
            raise ValueError(
                f"set_lora: expected a finite factor of one of {', '.join(known) or 'no adapters'}, "
                f"got {name!r}: {weight}"
            )
    let_run(model, list(weights))
    for adapters in _all(model):
        for name, weight in weights.items():
            adapters.set_scale(name, weight)


def unload_lora(target: Any, name: str = "default") -> None:
    """Remove a LoRA, also from the text encoders of a pipeline.

    Args:
        target: as given to `load_lora`.
        name: of the adapter.

    Raises:
        ValueError: no adapter has this name, or the model replays a CUDA graph.
    """
    model = packed_model(target, "unload_lora")
    check_not_graphed(model, "unload_lora")
    if name not in names_of(model):
        raise ValueError(f"unload_lora: no adapter is called {name!r}")
    for linear in [m for m in model.modules() if hasattr(m, ADAPTERS)]:
        getattr(linear, ADAPTERS).delete_adapter(name)
        if not getattr(linear, ADAPTERS):
            _forget(linear, add_branches)
            delattr(linear, ADAPTERS)
    getattr(model, "peft_config", {}).pop(name, None)
    if not names_of(model):
        _forget(model, _refuse_scale)
    if getattr(model, "peft_config", None) == {}:
        del model.peft_config
        model._hf_peft_config_loaded = False
    for encoder in _text_encoders(target).values():
        if name in getattr(encoder, "peft_config", ()):
            encoder.delete_adapter(name)
    _forget_compiled(model)


def names_of(model: nn.Module) -> list[str]:
    """Names of the adapters that `load_lora` added."""
    return list(dict.fromkeys(name for adapters in _all(model) for name in adapters))


def running_names(model: nn.Module) -> list[str]:
    """Names of those that run, while they are enabled."""
    return next((adapters.active_adapters for adapters in _all(model)), [])


def let_run(model: nn.Module, names: list[str]) -> None:
    """Let these run and no others."""
    for adapters in _all(model):
        adapters.set_adapter(names)


def packed_model(target: Any, caller: str) -> Any:
    """The packed transformer of a pipeline, or a transformer, taken out of what torch.compile put around it.

    Raises:
        ValueError: there is none.
    """
    model = target if isinstance(target, nn.Module) else getattr(target, "transformer", None)
    model = getattr(model, "_orig_mod", model)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if model is None or getattr(config, "scheme", None) is None:
        raise ValueError(
            f"{caller}: {type(target).__name__} holds no packed ditq transformer; a float model takes "
            "load_lora_weights of diffusers"
        )
    return model


def check_name(name: str, scale: float) -> None:
    """ValueError for a name that no module can have, or a scale that is no number."""
    if not name or "." in name or hasattr(Adapters(), name):
        raise ValueError(f"load_lora: an adapter cannot be called {name!r}; choose another name")
    if not math.isfinite(scale):
        raise ValueError(f"load_lora: scale must be finite, got {scale}")


def check_not_graphed(model: nn.Module, caller: str) -> None:
    """ValueError where a captured CUDA graph would replay what it captured, whatever adapters say."""
    if hasattr(getattr(vars(model).get("forward"), "__self__", None), REPLAYS):
        raise ValueError(
            f"{caller}: the transformer replays a CUDA graph, which would not see it; undo() what "
            "ditq.prepare gave, change adapters, then prepare again"
        )


def tell_diffusers(model: Any, name: str, adapters: Mapping[str, Adapter]) -> None:
    """Make the verbs of diffusers know an adapter; where the class takes no `scale`, refuse it."""
    if hasattr(type(model), "load_lora_adapter") and "peft" in sys.modules:
        from peft import LoraConfig

        rank = max(len(adapter.down) for adapter in adapters.values())
        model.peft_config = {
            **getattr(model, "peft_config", {}),
            name: LoraConfig(r=rank, lora_alpha=rank, target_modules=list(adapters)),
        }
        model._hf_peft_config_loaded = True
    takes_scale = "kwargs_name" in getclosurevars(type(model).forward).nonlocals
    if not takes_scale and _refuse_scale not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_refuse_scale, with_kwargs=True)
    _forget_compiled(model)


def text_encoders_of(target: Any, file: LoraFile, name: str, scale: float) -> Callable[[], None]:
    """What hands the tensors of text encoders on to those of the pipeline.

    Raises:
        ValueError: it has none for them.
    """
    encoders = _text_encoders(target)
    for part in file.text:
        if part not in encoders or not hasattr(target, "load_lora_into_text_encoder"):
            raise ValueError(
                f"load_lora: the file also holds a LoRA of {part}, which {type(target).__name__} cannot take; give "
                f"a pipeline with that encoder, or a state dict without the keys that begin with {part}."
            )

    def give() -> None:
        for part, tensors in file.text.items():
            target.load_lora_into_text_encoder(
                tensors,
                network_alphas=None,
                text_encoder=encoders[part],
                prefix=part,
                lora_scale=scale,
                adapter_name=name,
                metadata=file.config_of(part),
                _pipeline=target,
            )

    return give


def _text_encoders(target: Any) -> dict[str, Any]:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    found = {name: getattr(target, name, None) for name in names}
    return {name: encoder for name, encoder in found.items() if isinstance(encoder, nn.Module)}


def _all(model: nn.Module) -> list[Adapters]:
    return [m for m in model.modules() if isinstance(m, Adapters)]


def _refuse_scale(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A class whose forward ignores `scale` must not be given one."""
    for given in (*args, *(kwargs.get(name) for name in ATTENTION_KWARGS)):
        if isinstance(given, dict) and given.get("scale", 1.0) != 1.0:
            raise ValueError(
                f"scale: the forward of {type(model).__name__} takes none in its attention arguments; use "
                "ditq.set_lora(pipe, {name: scale})"
            )


def _forget(module: nn.Module, hook: Any) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, found in hooks.items() if found is hook]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _forget_compiled(model: nn.Module) -> None:
    """Compiled code does not look for new hooks: have it compiled again, where there is any."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

"""The verbs of diffusers' pipelines look past a model that `torch.compile(model)` wrapped, without a word.

They act on the packed model inside of it here; `transformer.compile()`, in place, wraps nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

VERBS = (
    "set_adapters", "enable_lora", "disable_lora", "delete_adapters", "unload_lora_weights", "fuse_lora", "unfuse_lora",
    "get_active_adapters", "get_list_adapters",
)  # fmt: skip


def enter_lora_base() -> None:
    """Let verbs of all pipelines do so; called once diffusers' loaders are imported."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    for name in VERBS:
        setattr(LoraBaseMixin, name, _through(vars(LoraBaseMixin)[name]))


def _through(verb: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(verb)
    def act(self: Any, *args: Any, **kwargs: Any) -> Any:
        components = {name: vars(self).get(name) for name in self._lora_loadable_modules}
        wrapped = {name: model for name, model in components.items() if _holds_packed(model)}
        vars(self).update({name: model._orig_mod for name, model in wrapped.items()})
        try:
            return verb(self, *args, **kwargs)
        finally:
            vars(self).update(wrapped)

    return act


def _holds_packed(model: Any) -> bool:
    inner = getattr(model, "_orig_mod", None)
    config = getattr(getattr(inner, "config", None), "quantization_config", None)
    return getattr(config, "scheme", None) is not None

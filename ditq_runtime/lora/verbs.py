"""The verbs of diffusers' LoRA interface, on one packed model: they act on what `load_lora` added, or say why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.lora.adapter import attach
from ditq_runtime.lora.file import read_adapters
from ditq_runtime.lora.switch import check_name, check_not_graphed, let_run, names_of, unload_lora


class Verb:
    """Stands for a method of one model, in its instance; copies and pickles go with the model."""

    def __init__(self, model: Any, name: str) -> None:
        """Remember whose method, and which."""
        self.model, self.name = model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return VERBS[self.name](self.model, self._stock, *args, **kwargs)

    def _stock(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)


Stock = Callable[..., Any]


def bind_verbs(model: Any) -> None:
    """Give a packed model its verbs, as far as its class has them."""
    for name in VERBS:
        if hasattr(type(model), name):
            setattr(model, name, Verb(model, name))


def _load(
    model: Any,
    stock: Stock,
    source: Any,
    prefix: str | None = "transformer",
    hotswap: bool = False,
    **kwargs: Any,
) -> Any:
    """As `load_lora_weights` of a pipeline calls it: with a state dict; as in PEFT, the newest runs alone."""
    folded = any(isinstance(m, QuantLinear) and m.folded for m in model.modules())
    if not folded or not isinstance(source, dict):
        known = set(getattr(model, "peft_config", ()))
        made = stock(source, prefix=prefix, hotswap=hotswap, **kwargs)
        new = [name for name in getattr(model, "peft_config", ()) if name not in known]
        if new:
            let_run(model, new)
        return made
    begin = "" if prefix is None else f"{prefix}."
    state = {k.removeprefix(begin): v for k, v in source.items() if k.startswith(begin)}
    for key, value in (kwargs.get("network_alphas") or {}).items():
        if key.startswith(begin):
            alpha = key.removeprefix(begin)
            state[alpha if alpha.endswith(".alpha") else f"{alpha}.alpha"] = value
    name = kwargs.get("adapter_name") or f"default_{len(getattr(model, 'peft_config', ()))}"
    check_name(name, 1.0)
    file = read_adapters(state, kwargs.get("metadata"))
    attach(model, model, file, name, 1.0, hotswap, alone=True)
    return None


def _unload(model: Any, stock: Stock) -> None:
    for name in names_of(model):
        unload_lora(model, name)
    stock()


def _delete(model: Any, stock: Stock, adapter_names: str | list[str]) -> None:
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    _check_known(model, "delete_adapters", names)
    for name in names:
        if name in names_of(model):
            unload_lora(model, name)
        elif name in getattr(model, "peft_config", ()):
            stock(name)


def _set(
    model: Any, stock: Stock, adapter_names: str | list[str], *args: Any, **kwargs: Any
) -> None:
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    _check_known(model, "set_adapters", names)
    check_not_graphed(model, "set_adapters")
    stock(adapter_names, *args, **kwargs)


def _switch(model: Any, stock: Stock, *args: Any, **kwargs: Any) -> None:
    check_not_graphed(model, "enabling and disabling adapters")
    stock(*args, **kwargs)


def _save(
    model: Any, stock: Stock, save_directory: Any, adapter_name: str = "default", **kwargs: Any
) -> None:
    if adapter_name in names_of(model):
        raise ValueError(
            f"save_lora_adapter: {adapter_name!r} is folded as this model is and fits no other; "
            "keep the file that it was loaded from"
        )
    own = vars(model)
    own["to"] = Kept(
        model
    )  # diffusers asks for .to(dtype=None), and refuses it of any quantized model
    try:
        stock(save_directory, adapter_name, **kwargs)
    finally:
        del own["to"]


class Kept:
    """Stands for `to` of one model: without a dtype or a place there is nothing to do."""

    def __init__(self, model: Any) -> None:
        """Remember whose."""
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do nothing, or what the model's class does."""
        asked = [value for value in (*args, *kwargs.values()) if value is not None]
        return type(self.model).to(self.model, *args, **kwargs) if asked else self.model


def _check_known(model: Any, caller: str, names: list[str]) -> None:
    known = [*getattr(model, "peft_config", ())]
    known += [name for name in names_of(model) if name not in known]
    for name in names:
        if name not in known:
            raise ValueError(
                f"{caller}: expected one of {', '.join(known) or 'no adapters'}, got {name!r}"
            )


VERBS: dict[str, Callable[..., Any]] = {
    "load_lora_adapter": _load,
    "unload_lora": _unload,
    "delete_adapters": _delete,
    "set_adapters": _set,
    "set_adapter": _switch,
    "enable_lora": _switch,
    "disable_lora": _switch,
    "enable_adapters": _switch,
    "disable_adapters": _switch,
    "save_lora_adapter": _save,
}

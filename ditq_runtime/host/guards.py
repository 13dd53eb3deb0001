"""What diffusers and PEFT offer but integer weights cannot do is refused with a sentence; it must not fail or lie."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

CANNOT = {
    "fuse_qkv_projections": "the integer weights of to_q, to_k and to_v have scales of their own and stay apart; "
    "ditq's kernels read the shared input once anyway",
    "fuse_lora": "an adapter cannot be merged into integer weights; leave it beside them, unfused",
}


def refuse_methods(model: Any) -> None:
    """Replace, on one packed model, the methods that would fail on integer weights."""
    for name, reason in CANNOT.items():
        if hasattr(type(model), name):
            setattr(model, name, MethodType(_refusal(name, reason), model))


def _refusal(name: str, reason: str) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"{name}: not possible on a packed ditq transformer: {reason}")

    return refuse


def _refuse_wrapping(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Called by torch for every module that gets a submodule: PEFT's wrappers take the linear as `base_layer`."""
    if name != "base_layer":
        return
    from ditq_runtime.layers.linear import QuantLinear  # not above: this file is light

    if isinstance(child, QuantLinear) and child.folded:
        wrapper = f"{type(parent).__module__}.{type(parent).__name__}"
        raise ValueError(
            f"{wrapper}: a factor was folded into or out of this linear, so a plain adapter on it would be silently "
            "wrong; use ditq.load_lora(pipe, path), which folds the adapter too"
        )


def watch_wrapping() -> None:
    """Refuse wrappers around folded linears, whoever makes them; called once, by importing `ditq_runtime`."""
    register_module_module_registration_hook(_refuse_wrapping)

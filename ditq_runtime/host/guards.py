"""What diffusers and PEFT offer but integer weights cannot do is refused with a sentence; it must not fail or lie."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

CANNOT = {
    "fuse_qkv_projections": "the integer weights of to_q, to_k and to_v have scales of their own and stay apart; "
    "ditq's kernels read the shared input once anyway",
    "fuse_lora": "an adapter cannot be merged into integer weights; leave it beside them, unfused",
}
# PEFT's layers that only add to, or scale, what the linear gives; the others read its float weight
BESIDE = (
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.loha.layer.Linear",
    "peft.tuners.lokr.layer.Linear",
)
INITS = (True, False, None, "gaussian", "eva")  # of a LoRA, without the float weight
HOLDS_ADAPTER = (
    "base_layer",
    "adapters",
)  # submodules of linears with adapters: PEFT's, and `lora.branch.ADAPTERS`
NO_FLOAT = "a packed ditq transformer has integer codes in its place; use plain LoRA, or tune the float model"
_made = [0]


class Refusal:
    """Stands for a method, in an instance: says why not. Copies and pickles with its owner."""

    def __init__(self, name: str, reason: str) -> None:
        """Remember both."""
        self.name, self.reason = name, reason

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse."""
        raise ValueError(f"{self.name}: not possible on a packed ditq transformer: {self.reason}")


class CheckedUpdate:
    """Stands for `update_layer` of PEFT's LoRA layer around packed weights: refuses what would read them."""

    def __init__(self, layer: Any) -> None:
        """Remember the layer."""
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Add an adapter."""
        for options in (
            kwargs,
            *(vars(a) for a in (*args, *kwargs.values()) if hasattr(a, "use_dora")),
        ):
            init = options.get("init_lora_weights")
            if options.get("use_dora"):
                raise ValueError(f"DoRA: it reads the float weight, and {NO_FLOAT}")
            if init not in INITS:
                raise ValueError(
                    f"init_lora_weights={init!r}: it reads the float weight, and {NO_FLOAT}"
                )
        return type(self.layer).update_layer(self.layer, *args, **kwargs)


def refuse_methods(model: Any) -> None:
    """Replace, on one packed model, the methods that would fail on integer weights."""
    from ditq_runtime.host.float_twin import num_parameters  # not above: this file is light
    from ditq_runtime.lora.verbs import bind_verbs

    for name, reason in CANNOT.items():
        if hasattr(type(model), name):
            setattr(model, name, Refusal(name, reason))
    model.num_parameters = partial(num_parameters, model)
    bind_verbs(model)


def _watch_wrapping(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Called by torch for every module that gets a submodule: PEFT's wrappers take the linear as `base_layer`."""
    if name in HOLDS_ADAPTER:
        _made[0] += 1
    if name != "base_layer":
        return
    from ditq_runtime.layers.linear import QuantLinear  # not above: this file is light

    if not isinstance(child, QuantLinear):
        return
    wrapper = f"{type(parent).__module__}.{type(parent).__name__}"
    if child.folded:
        raise ValueError(
            f"{wrapper}: a factor was folded into or out of this linear, so a plain adapter on it would be silently "
            "wrong; use ditq.load_lora(pipe, path), which folds the adapter too"
        )
    if wrapper not in BESIDE:
        raise ValueError(f"{wrapper}: it reads the float weight, and {NO_FLOAT}")
    vars(parent)["merge"] = Refusal("merge", CANNOT["fuse_lora"])
    if ".lora." in wrapper:
        vars(parent)["update_layer"] = CheckedUpdate(parent)


def adapters_made() -> int:
    """How often a linear of this process got a first adapter, ours or PEFT's; a number that never falls."""
    return _made[0]


def watch_wrapping() -> None:
    """Check wrappers around packed linears, whoever makes them; called once, by importing `ditq_runtime`."""
    register_module_module_registration_hook(_watch_wrapping)

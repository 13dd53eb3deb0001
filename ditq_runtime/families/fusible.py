"""Which blocks may run fused, and why the others may not.

A fused block calls none of the modules inside of it, so it may only run where that makes no difference: where every
part is what the checkpoint made it and nobody hooked one, as offloading, adapters and calibration do. That is looked at
in every forward, so a block follows what is done to it; `execution_report` shows which way each one ran.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditq_runtime.families.fused import Parts, part_of
from ditq_runtime.format.attention import CORE
from ditq_runtime.layers.linear import QuantLinear

OBSERVES = "observes"  # attribute of a hook that only looks, and needs no module to be called
FUSION = "fusion"  # name of the `Fusion` in a block


class Fusion:
    """A block's switch. A plain object: it has no state to save.

    Attributes:
        layout: what a fused block of the family is made of.
        wanted: what `configure(fuse=...)` said last; True at first.
        obstacle: what in the checkpoint stands against fusing; empty: nothing.
    """

    def __init__(self, layout: Parts) -> None:
        """Wanted, but there is nothing to run yet."""
        self.layout, self.wanted = layout, True
        self.obstacle = "its weights are not loaded"


def make_fusible(block: nn.Module, layout: Parts) -> None:
    """Give a block, whose forward asks `why_not`, its switch; `examine` must see its tensors before it runs fused."""
    setattr(block, FUSION, Fusion(layout))
    block.register_load_state_dict_post_hook(examine)


def fusible_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model that have a fused forward, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, FUSION)}


def layout_of(block: nn.Module) -> Parts:
    """What a block with a fused forward is made of."""
    layout: Parts = getattr(block, FUSION).layout
    return layout


def examine(block: nn.Module, *_: Any) -> None:
    """Look at a block's tensors after they were loaded: what formats and values say about fusing it."""
    layout = layout_of(block)
    getattr(block, FUSION).obstacle = _moved(block, layout) or _obstacle(block, layout)


def why_not(block: nn.Module) -> str:
    """Why a block does not run fused; empty if it does."""
    fusion = getattr(block, FUSION)
    if not fusion.wanted:
        return "switched off with configure(fuse=False)"
    return fusion.obstacle or _moved(block, fusion.layout)


def _moved(block: Any, layout: Parts) -> str:
    """What was done to the modules of a block since they were made; cheap, for every forward."""
    for name, path, expected in layout.paths:
        part: Any = block
        for step in path:
            part = part._modules.get(step)
            if part is None:
                return f"{name} is gone"
        kind, held = type(part), part.__dict__
        if kind is not expected:
            return f"{name} is a {kind.__name__}"
        if is_hooked(part) or (kind is QuantLinear and is_hooked(held["site"])):
            return f"{name} has a hook (an adapter, offloading or a probe) and must run by itself"
        if kind is nn.Dropout and held["training"] and part.p:
            return f"{name} drops values in training"
    for name, emitter in layout.modulations.items():
        modulation = type(part_of(block, name))  # called by a fused block too: hooks are welcome
        if modulation is not emitter:
            return f"{name} is a {modulation.__name__}, and fused blocks need its output in fp32"
    for name, (stock, quantized) in layout.attentions.items():
        attn: Any = block._modules[name]
        processor = stock if attn._modules.get(CORE) is None else quantized
        if type(attn.processor) is not processor:
            return f"{name} has a processor {type(attn.processor).__name__}"
    return ""


def is_hooked(part: nn.Module | None) -> bool:
    """Somebody wants to see or change what the module does when it is called."""
    if part is None:
        return False
    held = part.__dict__
    if not held["_forward_hooks"] and not held["_forward_pre_hooks"]:  # as good as always
        return "forward" in held and _has_own_forward(part)
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    return not all(hasattr(hook, OBSERVES) for hook in hooks) or _has_own_forward(part)


def _has_own_forward(part: nn.Module) -> bool:
    """Someone put another forward on the module; accelerate leaves the class's own there when it goes."""
    own = part.__dict__.get("forward")
    if own is None:
        return False
    stock = getattr(own, "__func__", None) is type(part).forward
    return not (stock and own.__self__ is part)


def _obstacle(block: Any, layout: Parts) -> str:
    """What formats and values of a block whose parts are in place say against fusing it."""
    for name in layout.linears:
        found = block.get_submodule(name).format
        if not found.integer_gemm:
            return f"{name} is {found.name}, and fused blocks need integers"
    obstacles = (sublayer.obstacle(block) for sublayer in layout.sublayers)
    return next((reason for reason in obstacles if reason), "")

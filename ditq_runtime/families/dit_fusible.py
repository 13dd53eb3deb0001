"""Which DiT blocks may run fused, and why the others may not.

A fused block calls none of the modules inside of it, so it may only run where that makes no difference: where every
part is what the checkpoint made it and nobody hooked one, as offloading, adapters and calibration do. That is looked at
in every forward, so a block follows what is done to it; `execution_report` shows which way each one ran.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from ditq_runtime.attention_install import PLAIN, not_plain
from ditq_runtime.attention_processor import CORE, QuantAttnProcessor
from ditq_runtime.linear import QuantLinear

FUSION = "fusion"  # name of the `Fusion` in a block
WEIGHTS = ("w8", "w4p")  # those with fused ops
SHARED = ("act_scale", "act_zero", "smooth_inv")  # what q, k and v must agree on to read one input
NO_NORMS = {**PLAIN, "norm_q": None, "norm_k": None}
PARTS = {  # what a fused block does not call: name -> what it must be
    "norm1.norm": nn.LayerNorm,
    "norm3": nn.LayerNorm,
    "attn1": Attention,
    "attn1.to_q": QuantLinear,
    "attn1.to_k": QuantLinear,
    "attn1.to_v": QuantLinear,
    "attn1.to_out.0": QuantLinear,
    "attn1.to_out.1": nn.Dropout,
    "ff": FeedForward,
    "ff.net.0": GELU,
    "ff.net.0.proj": QuantLinear,
    "ff.net.1": nn.Dropout,
    "ff.net.2": QuantLinear,
}
PATHS = {name: tuple(name.split(".")) for name in PARTS}
ATTENTION = "attn1"
LINEARS = tuple(name for name, kind in PARTS.items() if kind is QuantLinear)


class Fusion:
    """A block's switch. A plain object: it has no state to save.

    Attributes:
        wanted: what `configure(fuse=...)` said last; True at first.
        obstacle: what in the checkpoint stands against fusing; empty: nothing.
    """

    wanted = True
    obstacle = "its weights are not loaded"


def fusible_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model that have a fused forward, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, FUSION)}


def examine(block: nn.Module, *_: Any) -> None:
    """Look at a block's tensors after they were loaded: what formats and values say about fusing it."""
    getattr(block, FUSION).obstacle = _moved(block) or _obstacle(block)


def why_not(block: nn.Module) -> str:
    """Why a block does not run fused; empty if it does."""
    fusion = getattr(block, FUSION)
    if not fusion.wanted:
        return "switched off with configure(fuse=False)"
    return fusion.obstacle or _moved(block)


def _moved(block: Any) -> str:
    """What was done to the modules of a block since they were made; cheap, for every forward."""
    for name, path in PATHS.items():
        part: Any = block
        for step in path:
            part = part._modules.get(step)
            if part is None:
                return f"{name} is gone"
        if type(part) is not PARTS[name]:
            return f"{name} is a {type(part).__name__}"
        if part._forward_hooks or part._forward_pre_hooks or _has_own_forward(part):
            return f"{name} has a hook (an adapter, offloading or a probe) and must run by itself"
        if type(part) is nn.Dropout and part.training and part.p:
            return f"{name} drops values in training"
    modulation = type(block.norm1.linear)  # called by a fused block too: hooks are welcome
    if modulation is not QuantLinear:
        return f"norm1.linear is a {modulation.__name__}, and fused blocks need its output in fp32"
    attn: Any = block._modules["attn1"]
    processor = AttnProcessor2_0 if attn._modules.get(CORE) is None else QuantAttnProcessor
    if type(attn.processor) is not processor:
        return f"attn1 has a processor {type(attn.processor).__name__}"
    return ""


def _has_own_forward(part: nn.Module) -> bool:
    """Someone put another forward on the module; accelerate leaves the class's own there when it goes."""
    own = part.__dict__.get("forward")
    if own is None:
        return False
    stock = getattr(own, "__func__", None) is type(part).forward
    return not (stock and own.__self__ is part)


def _obstacle(block: Any) -> str:
    """What formats and values of a block whose parts are in place say against fusing it."""
    linears = {name: block.get_submodule(name) for name in LINEARS}
    for name, layer in linears.items():
        if not layer.format.integer_gemm or layer.format.weights not in WEIGHTS:
            return f"{name} is {layer.format.name}, and fused blocks need integers, w8 or w4p"
    for norm in (block.norm1.norm, block.norm3):
        if norm.weight is not None or norm.bias is not None:
            return "its layer norms have weights of their own"
    if block.ff.net[0].approximate != "tanh" or len(block.ff.net) != 3:
        return "its feed-forward is not fc1, GELU in the tanh form, fc2"
    return not_plain(block.attn1, NO_NORMS, "a fused block") or _unshared(
        *list(linears.values())[:3]
    )


def _unshared(first: QuantLinear, *others: QuantLinear) -> str:
    """Why q, k and v cannot read one quantized input; empty if they can."""
    for other in others:
        same_kind = [(layer.format.activations, layer.format.smooth) for layer in (first, other)]
        if same_kind[0] != same_kind[1]:
            return "to_q, to_k and to_v quantize their input in different ways"
        for name in SHARED:
            if not hasattr(first, name):
                continue
            mine, theirs = getattr(first, name), getattr(other, name)
            if mine.is_meta or theirs.is_meta:
                return "its weights are offloaded"
            if not torch.equal(mine, theirs):
                return f"to_q, to_k and to_v have different {name}"
    return ""

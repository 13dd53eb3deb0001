"""A factor that was folded through V holds where an attention only mixes V; a block looks whether its own still do.

x = P V with rows of P that sum to one, so a factor and a shift of V are one of x. A processor that adds values of its
own before the output projection, as IP-Adapters do, would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from diffusers.models import attention_processor
from diffusers.models.transformers import transformer_flux
from torch import nn

# processors of diffusers that mix V; Flux's IP-Adapter adds behind the output projection
NAMES = (
    "AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor",
    "JointAttnProcessor2_0", "XFormersJointAttnProcessor", "PAGIdentitySelfAttnProcessor2_0",
    "PAGCFGIdentitySelfAttnProcessor2_0", "PAGJointAttnProcessor2_0", "PAGCFGJointAttnProcessor2_0",
)  # fmt: skip
MIX_ONLY = frozenset(
    [getattr(attention_processor, name) for name in NAMES]
    + [transformer_flux.FluxAttnProcessor, transformer_flux.FluxIPAdapterAttnProcessor]
)


def guard_values(block: nn.Module, producers: Iterable[str]) -> None:
    """Let a block refuse to run once an attention of it has another processor that may add values.

    Args:
        block: with the processors that it is to run with.
        producers: names inside of it of the linears whose rows carry a fold as V.
    """
    for name in sorted({producer.rpartition(".")[0] for producer in producers}):
        processor = getattr(block.get_submodule(name), "processor", None)
        if processor is not None:
            # the block itself may be the attention, as the face adapter of Wan Animate is
            path, known = tuple(filter(None, name.split("."))), type(processor)
            block.register_forward_pre_hook(partial(_check, path, known))


def _check(path: tuple[str, ...], known: type, block: nn.Module, args: Any) -> None:
    attn: Any = block
    for step in path:
        attn = getattr(attn, step)
    found = type(attn.processor)
    if found is not known and found not in MIX_ONLY:
        raise ValueError(
            f"{'.'.join(path) or type(block).__name__}: its processor is a {found.__name__}, and a factor was folded "
            f"through V for {known.__name__}; one that adds values of its own, as an IP-Adapter does, would be "
            "silently wrong: set that one again, or convert with --method linear, which folds nothing"
        )

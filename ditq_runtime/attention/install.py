"""Which attentions of diffusers can run quantized, and how one is made to.

What a module computes is told by its stock processor; a table says which of ours takes that one's place, and what the
module must be so that nothing is left out.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import nn

from ditq_kernels.checks.attention import HEAD_DIMS
from ditq_runtime.attention.joint import TEXT_NORMS, QuantJointAttnProcessor
from ditq_runtime.attention.processor import NORMS as HEAD_NORMS
from ditq_runtime.attention.processor import QuantAttnProcessor
from ditq_runtime.attention.quantized import QuantAttention
from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.attention import CORE, AttentionFormat

JOINT = {  # what an Attention must be, so that projections, norms, softmax and outputs are all it does
    "group_norm": None,
    "spatial_norm": None,
    "norm_cross": None,
    "residual_connection": False,
    "rescale_output_factor": 1.0,
    "is_causal": False,
    "pre_only": False,
    "fused_projections": False,
}
PLAIN = {**JOINT, "added_kv_proj_dim": None}
FLUX = {"fused_projections": False}
TAKES_PLACE_OF: dict[type, tuple[type, dict[str, Any]]] = {
    AttnProcessor: (QuantAttnProcessor, PLAIN),
    AttnProcessor2_0: (QuantAttnProcessor, PLAIN),
    JointAttnProcessor2_0: (QuantJointAttnProcessor, JOINT),
    FluxAttnProcessor: (QuantJointAttnProcessor, FLUX),
}
PROCESSORS = (QuantAttnProcessor, QuantJointAttnProcessor)
NORMS = (RMSNorm, nn.RMSNorm, nn.LayerNorm)


def unsupported(attn: nn.Module) -> str:
    """Why an attention module cannot be quantized; empty if it can."""
    if not isinstance(attn, Attention | FluxAttention):
        return f"a {type(attn).__name__} is not diffusers' Attention"
    stock = type(attn.processor)
    if stock not in TAKES_PLACE_OF:
        return f"its processor is a {stock.__name__}, which quantized attention cannot stand in for"
    reason = not_plain(attn, TAKES_PLACE_OF[stock][1], "quantized attention")
    if reason:
        return reason
    if getattr(attn, "inner_kv_dim", attn.inner_dim) != attn.inner_dim:
        return "it has fewer key heads than query heads"
    head_dim = attn.inner_dim // attn.heads
    if head_dim not in HEAD_DIMS:
        return f"its head dimension is {head_dim}, quantized attention needs one of {HEAD_DIMS}"
    return _unsupported_norm(attn, head_dim)


def recognised(block: nn.Module) -> list[str]:
    """Names of the attentions inside a block whose stock processor has one of ours to stand in for it."""
    return [
        name
        for name, module in block.named_modules()
        if isinstance(module, Attention | FluxAttention)
        and type(module.processor) in TAKES_PLACE_OF
    ]


def not_plain(attn: Any, plain: dict[str, Any], what: str) -> str:
    """The first attribute of an attention that is not as a path through it needs it; empty if all are."""
    for name, needed in plain.items():
        found = getattr(attn, name)
        if found != needed:
            shown = type(found).__name__ if isinstance(found, nn.Module) else found
            return f"its {name} is {shown}, {what} needs {needed}"
    return ""


def _unsupported_norm(attn: nn.Module, head_dim: int) -> str:
    for name in (*HEAD_NORMS, *TEXT_NORMS):
        norm: Any = getattr(attn, name, None)
        if norm is None:
            continue
        over = norm.dim if isinstance(norm, RMSNorm) else getattr(norm, "normalized_shape", ())
        if not isinstance(norm, NORMS) or tuple(over) != (head_dim,):
            return f"its {name} is {type(norm).__name__} over {list(over)}, quantized attention needs one over a head"
    return ""


def install(model: nn.Module, name: str, attention_format: AttentionFormat) -> None:
    """Make the attention called `name` run quantized; its scales are uninitialized, on meta.

    Raises:
        CheckpointError: there is no such module, or it does what quantized attention cannot.
    """
    attn: Any = dict(model.named_modules()).get(name)
    if attn is None:
        raise CheckpointError(
            f"{name}: listed in the scheme, but the model has no attention of that name"
        )
    reason = unsupported(attn)
    if reason:
        raise CheckpointError(f"{name}: {reason}; convert the model with --attention none")
    # Flux's attention has no scale of its own: torch's default
    softmax_scale = getattr(attn, "scale", (attn.inner_dim // attn.heads) ** -0.5)
    processor, _ = TAKES_PLACE_OF[type(attn.processor)]
    setattr(attn, CORE, QuantAttention(attn.heads, attention_format, softmax_scale))
    attn.set_processor(processor())

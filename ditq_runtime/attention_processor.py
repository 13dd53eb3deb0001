"""The processor that makes a diffusers `Attention` run `QuantAttention` between its own projections.

A plain object without state, set on one module at a time; the scales live in the module's child `core`, where hooks,
casts and the state dict find them. What the processor would have to drop it refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ditq_kernels.checks import HEAD_DIMS
from ditq_runtime.attention import QuantAttention
from ditq_runtime.attention_format import AttentionFormat
from ditq_runtime.errors import CheckpointError

CORE = "core"  # name of the child that holds the scales
MASKED = (
    -9984.0
)  # a masked key's bias, -10000, in bf16; its probability is 0 in fp32 for any logits below 4900
PLAIN = {  # what an Attention must be, so that projections, softmax and output are all it does
    "group_norm": None,
    "spatial_norm": None,
    "norm_cross": None,
    "norm_q": None,
    "norm_k": None,
    "added_kv_proj_dim": None,
    "residual_connection": False,
    "rescale_output_factor": 1.0,
    "is_causal": False,
    "pre_only": False,
    "fused_projections": False,
}


class QuantAttnProcessor:
    """Q, K and V from the module's projections, its `core` between, its output projection behind.

    `upcast_attention` asks for nothing more: logits are integers and the softmax is fp32 always.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As diffusers calls it.

        Args:
            attn: the `Attention`.
            hidden_states: [B, Tq, K].
            encoder_hidden_states: [B, Tk, K'] of a cross-attention; None: hidden_states.
            attention_mask: [B, Tk] or [B, 1, Tk]: bool, True where a key is attended; or a bias, 0 there and at most
                `MASKED` elsewhere.

        Returns:
            [B, Tq, N].

        Raises:
            NotImplementedError: a mask of another kind, or images instead of tokens.
        """
        if hidden_states.dim() != 3:
            raise NotImplementedError(
                f"quantized attention: hidden_states must be [B, T, K], got {list(hidden_states.shape)}; "
                "flatten pixels to tokens"
            )
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key_mask = key_mask_of(attention_mask, *source.shape[:2])
        query, key, value = (
            y.unflatten(-1, (attn.heads, -1))
            for y in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        context = getattr(attn, CORE)(query, key, value, key_mask).flatten(2)
        return attn.to_out[1](attn.to_out[0](context))


def key_mask_of(mask: torch.Tensor | None, batch: int, keys: int) -> torch.Tensor | None:
    """The mask [B, Tk] bool of an `attention_mask`.

    Raises:
        NotImplementedError: it is no mask over keys.
        RuntimeError: it is a bias that neither leaves a key nor masks it; on CUDA a device-side assertion.
    """
    if mask is None:
        return None
    is_mask = mask.dtype == torch.bool or mask.is_floating_point()
    if not is_mask or tuple(mask.shape) not in ((batch, keys), (batch, 1, keys)):
        raise NotImplementedError(
            f"quantized attention: attention_mask must be [{batch}, {keys}], bool or a bias, got "
            f"{list(mask.shape)} {mask.dtype}; masks per query or head need a checkpoint converted with "
            "--attention none"
        )
    flat = mask.reshape(batch, keys).contiguous()
    return flat if mask.dtype == torch.bool else _attended(flat)


def _attended(bias: torch.Tensor) -> torch.Tensor:
    """Where a bias [B, Tk] is 0; all keys of an image that masks all: softmax ignores a bias that they share."""
    attended = bias == 0
    torch._assert_async(
        (attended | (bias <= MASKED)).all(),
        f"quantized attention: a bias must be 0 (attended) or at most {MASKED:.0f} (masked) at every key; other "
        "biases need a checkpoint converted with --attention none",
    )
    return attended | ~attended.any(1, keepdim=True)


def unsupported(attn: nn.Module) -> str:
    """Why an attention module cannot be quantized; empty if it can."""
    if not isinstance(attn, Attention):
        return f"a {type(attn).__name__} is not diffusers' Attention"
    for name, plain in PLAIN.items():
        found = getattr(attn, name)
        if found != plain:
            shown = type(found).__name__ if isinstance(found, nn.Module) else found
            return f"its {name} is {shown}, quantized attention needs {plain}"
    if attn.inner_kv_dim != attn.inner_dim:
        return "it has fewer key heads than query heads"
    head_dim = attn.inner_dim // attn.heads
    if head_dim not in HEAD_DIMS:
        return f"its head dimension is {head_dim}, quantized attention needs one of {HEAD_DIMS}"
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
    setattr(attn, CORE, QuantAttention(attn.heads, attention_format, attn.scale))
    attn.set_processor(QuantAttnProcessor())

"""The processor of attentions in which image and text tokens attend to each other: SD3's and Flux's.

RMS norms and rotary embedding happen in the quantizer, in fp32. Flux puts its text first, SD3 last; a module
without text projections attends within one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention

from ditq_runtime.attention.processor import (
    IMAGE,
    NORMS,
    LocalProcessor,
    Names,
    key_mask_of,
    normed,
    operand,
    project,
)
from ditq_runtime.attention.quantized import Streams
from ditq_runtime.format.attention import CORE

TEXT, TEXT_NORMS = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")


class QuantJointAttnProcessor(LocalProcessor):
    """Q, K and V of both streams side by side, the module's `core` between, each stream's output projection behind."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        ip_hidden_states: Any = None,
        ip_adapter_masks: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As diffusers calls it.

        Args:
            attn: a `FluxAttention`, or the `Attention` of an SD3 block.
            hidden_states: [B, T, K] image tokens; in Flux's single blocks all tokens.
            encoder_hidden_states: [B, T', K'] text tokens, or None.
            attention_mask: over the keys of both streams, [B, 1, 1, T' + T], bool or a bias (see `key_mask_of`);
                SD3's attention takes none.
            image_rotary_emb: cos and sin, [T' + T, D] each, or None.
            ip_hidden_states: of an IP-Adapter; refused.
            ip_adapter_masks: of an IP-Adapter; refused.

        Returns:
            [B, T, N], and with text also its tokens, [B, T', N'].

        Raises:
            NotImplementedError: a mask of another kind, or an IP-Adapter.
        """
        if ip_hidden_states is not None or ip_adapter_masks is not None:
            raise NotImplementedError(
                "quantized attention: IP-Adapters need a checkpoint converted with --attention none"
            )
        if (encoder_hidden_states is None) != (attn.added_kv_proj_dim is None):
            raise NotImplementedError(
                "quantized attention: text tokens go with text projections; this module "
                f"{'lacks the projections' if attn.added_kv_proj_dim is None else 'was given no tokens'}"
            )
        text_first = isinstance(attn, FluxAttention)
        streams = [(project(attn, hidden_states, IMAGE), NORMS)]
        if encoder_hidden_states is not None:
            text = (project(attn, encoder_hidden_states, TEXT), TEXT_NORMS)
            streams.insert(0 if text_first else 1, text)
        keys = sum(made[1].shape[1] for made, _ in streams)
        key_mask = _mask(attention_mask, len(hidden_states), keys, text_first)
        context = attend_streams(attn, streams, image_rotary_emb, key_mask)
        if encoder_hidden_states is None:
            # a single block of Flux projects it together with its MLP
            return context if attn.pre_only else attn.to_out[1](attn.to_out[0](context))
        sizes = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        first, second = context.split(sizes[::-1] if text_first else sizes, dim=1)
        image, text_out = (second, first) if text_first else (first, second)
        if attn.to_add_out is not None:
            text_out = attn.to_add_out(text_out)
        return attn.to_out[1](attn.to_out[0](image)), text_out


def attend_streams(
    attn: Any,
    streams: Sequence[tuple[Sequence[torch.Tensor], Names]],
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a quantized attention does between its projections.

    Args:
        attn: with a `core`.
        streams: Q, K, V [B, T, H, D] of one stream after another, and the names of their norms.
        image_rotary_emb: as above.
        key_mask: [B, Tk] bool, over the keys of all streams.

    Returns:
        [B, T, H * D], tokens of all streams.
    """
    heads: list[Streams] = []
    start = 0
    for (query, key, _), norms in streams:
        rotation = _rows(image_rotary_emb, start, query.shape[1])
        heads.append(
            [normed(attn, n, x, **rotation) for n, x in zip(norms, (query, key), strict=True)]
        )
        start += query.shape[1]
    values = [made[2] for made, _ in streams]
    value = values[0] if len(values) == 1 else torch.cat(values, 1)
    context: torch.Tensor = getattr(attn, CORE)(
        *map(operand, zip(*heads, strict=True)), value, key_mask
    )
    return context.flatten(2)


def _rows(
    tables: tuple[torch.Tensor, torch.Tensor] | None, start: int, count: int
) -> dict[str, torch.Tensor]:
    """The rotation of some tokens, as the quantizer takes it."""
    if tables is None:
        return {}
    cos, sin = (t if t.dtype == torch.float32 else t.float() for t in tables)
    if count < len(cos):
        cos, sin = cos.narrow(0, start, count), sin.narrow(0, start, count)
    return {"cos": cos, "sin": sin}


def _mask(mask: torch.Tensor | None, batch: int, keys: int, takes_one: bool) -> torch.Tensor | None:
    """[B, Tk] bool of a mask as torch's attention takes it: its two dimensions before the keys must be 1."""
    if mask is None:
        return None
    if not takes_one or mask.dim() != 4 or tuple(mask.shape[1:3]) != (1, 1):
        wanted = f"must be [{batch}, 1, 1, {keys}]" if takes_one else "must be None"
        raise NotImplementedError(
            f"quantized attention: attention_mask of this module {wanted}, got {list(mask.shape)}; masks per query or "
            "head need a checkpoint converted with --attention none"
        )
    return key_mask_of(mask[:, 0, 0], batch, keys)

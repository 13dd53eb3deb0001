"""Float attention between the projections of a fused block with streams, as diffusers' processors do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from ditq_runtime.attention.processor import Names

Projected = Sequence[tuple[Sequence[torch.Tensor], Names]]  # Q, K, V [B, T, H, D], their norms


def attend_flux(attn: Any, streams: Projected, rotation: Any) -> torch.Tensor:
    """As `FluxAttnProcessor`: [B, T, H * D] of all streams; Q and K are rotated at once."""
    query, key, value = _side_by_side(attn, streams)
    if rotation is not None:
        both = apply_rotary_emb(torch.cat([query, key], 2), rotation, sequence_dim=1)
        query, key = both.chunk(2, dim=2)
    context = dispatch_attention_fn(
        query, key, value,
        backend=attn.processor._attention_backend, parallel_config=attn.processor._parallel_config,
    )  # fmt: skip
    return context.flatten(2, 3).to(query.dtype)


def attend_sd3(attn: Any, streams: Projected, rotation: Any) -> torch.Tensor:
    """As `JointAttnProcessor2_0`: [B, T, H * D] of all streams, nothing is rotated."""
    query, key, value = (x.transpose(1, 2) for x in _side_by_side(attn, streams))
    context = nn.functional.scaled_dot_product_attention(query, key, value)
    return context.transpose(1, 2).flatten(2)


def _side_by_side(attn: Any, streams: Projected) -> list[torch.Tensor]:
    """Q, K and V [B, T, H, D] of all streams, Q and K normed."""
    normed = []
    for (query, key, value), names in streams:
        norms = (getattr(attn, name) for name in names)
        q, k = (x if norm is None else norm(x) for x, norm in zip((query, key), norms, strict=True))
        normed.append((q, k, value))
    if len(normed) == 1:
        return list(normed[0])
    return [torch.cat(parts, dim=1) for parts in zip(*normed, strict=True)]

"""Float attention between the projections of a fused block with streams, as diffusers' processors do it, to the bit.

Fewer operators: queries and keys of all streams stand in one memory and are rotated at once, by a table that is made
once for all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from ditq_runtime.attention.dispatcher import asks_for_torch
from ditq_runtime.attention.processor import Names
from ditq_runtime.families.fusible import is_hooked

Projected = Sequence[tuple[Sequence[torch.Tensor], Names]]  # Q, K, V [B, T, H, D], their norms
Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin
SIGNED = "ditq_signed"  # attribute of a table of sines: its version, and what `_signed` made of it


def attend_flux(attn: Any, streams: Projected, rotation: Tables | None) -> torch.Tensor:
    """As `FluxAttnProcessor`: [B, T, H * D] of all streams."""
    query, key, value = _side_by_side(attn, streams, rotation)
    if asks_for_torch(attn.processor):
        context = _attend(query, key, value)
    else:
        context = dispatch_attention_fn(
            query, key, value,
            backend=attn.processor._attention_backend, parallel_config=attn.processor._parallel_config,
        )  # fmt: skip
    flat = context.flatten(2, 3)
    return flat if flat.dtype is query.dtype else flat.to(query.dtype)


def attend_sd3(attn: Any, streams: Projected, rotation: Tables | None) -> torch.Tensor:
    """As `JointAttnProcessor2_0`: [B, T, H * D] of all streams, nothing is rotated."""
    return _attend(*_side_by_side(attn, streams, None)).flatten(2)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Torch's own attention of [B, T, H, D]."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _side_by_side(attn: Any, streams: Projected, rotation: Tables | None) -> list[torch.Tensor]:
    """Q, K and V [B, T, H, D] of all streams, Q and K normed and rotated."""
    inside = attn._modules
    queries, keys, values = [], [], []
    for (query, key, value), (norm_q, norm_k) in streams:
        queries.append(_normed(inside.get(norm_q), query))
        keys.append(_normed(inside.get(norm_k), key))
        values.append(value)
    alone = len(values) == 1
    if alone and rotation is None:
        return [*queries, *keys, *values]
    batch, _, *head = values[0].shape
    both = torch.cat([*queries, *keys], 1)
    both = both.view(batch, 2, both.shape[1] // 2, *head)
    if rotation is not None:
        both = _rotated(both, *rotation)
    query, key = both.unbind(1)
    return [query, key, values[0] if alone else torch.cat(values, 1)]


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """What a norm of heads makes of x; like all parts of a fused block, torch's own is called only if hooked."""
    if norm is None:
        return x
    if type(norm) is not nn.RMSNorm or is_hooked(norm):
        made: torch.Tensor = norm(x)
        return made
    own = norm.__dict__  # not by attribute: torch looks for parameters in Python
    return torch.rms_norm(x, own["normalized_shape"], norm._parameters["weight"], own["eps"])


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv:2104.09864) of pairs of neighbours in x [..., T, H, D], in fp32, in the dtype of x.

    Cos and sin are [T, D] for all channels. A pair (a, b) becomes (a * cos + b * -sin, b * cos + a * sin).
    """
    swapped = x.view(*x.shape[:-1], x.shape[-1] // 2, 2).flip(-1).view(x.shape)
    made = (x * _wide(cos, x)[:, None]).add_(swapped * _signed(sin, x))
    return made if made.dtype is x.dtype else made.to(x.dtype)


def _signed(sin: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[T, 1, D] that is minus sin for the first of each pair; kept with the table, which all blocks read."""
    kept = None if sin.is_inference() else getattr(sin, SIGNED, None)
    if kept is not None and kept[0] == sin._version and kept[1].device == x.device:
        found: torch.Tensor = kept[1]
        return found
    pairs = _wide(sin, x).view(len(sin), 1, sin.shape[1] // 2, 2)
    made = torch.stack([-pairs[..., 0], pairs[..., 1]], -1).flatten(2)
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()  # empty before a replay
    if not captured and not sin.is_inference():
        setattr(sin, SIGNED, (sin._version, made))
    return made


def _wide(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A table where x is, in fp32 or wider."""
    if table.dtype is torch.float32 and table.device == x.device:
        return table
    return table.to(x.device, torch.promote_types(table.dtype, torch.float32))

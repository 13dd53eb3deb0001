"""DiT (Peebles and Xie, arXiv:2212.09748), as diffusers' DiTTransformer2DModel: the table and the packed block.

Chunks of `norm1.linear`: 0 shift_msa, 1 scale_msa, 2 gate_msa, 3 shift_mlp, 4 scale_mlp, 5 gate_mlp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditq_runtime.families.adaln import (
    Modulation,
    add_gated,
    add_mlp,
    find_group,
    hoisted,
    modulate,
    swap_forward,
)
from ditq_runtime.families.family import BlockTable, Family, Hoistable, blocks_in
from ditq_runtime.families.fused import Layout
from ditq_runtime.families.fusible import make_fusible, why_not
from ditq_runtime.families.sites import BEHIND_GELU, AdaLN, OnTheFly, Site, ValueRows
from ditq_runtime.families.sublayers import FeedForwardLayer, SelfAttention
from ditq_runtime.layers.linear import QuantLinear

SITES = (
    Site("qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), AdaLN("norm1.linear", 0, 1)),
    Site("o_proj", ("attn1.to_out.0",), ValueRows(("attn1.to_v",))),
    Site("fc1", ("ff.net.0.proj",), AdaLN("norm1.linear", 3, 4)),
    Site("fc2", ("ff.net.2",), OnTheFly(BEHIND_GELU)),
)
LAYOUT = Layout(
    {"norm1.linear": QuantLinear},
    SelfAttention("attn1", norm="norm1.norm"),
    FeedForwardLayer("ff", norm="norm3"),
)


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    timestep: torch.Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: torch.Tensor | None = None,
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """One DiT block whose modulation linear emits the AdaLN multiplier itself; diffusers' signature."""
    if encoder_hidden_states is not None or encoder_attention_mask is not None:
        raise ValueError(
            "DiT blocks have no cross-attention: encoder_hidden_states and its mask must be None"
        )
    find_group(self, timestep)
    rows = hoisted(self)
    if rows is None:
        rows = _modulation(self, timestep, class_labels, hidden_states.dtype)
    m = Modulation(*rows.chunk(6, dim=1))

    if not (attention_mask is not None or cross_attention_kwargs or why_not(self)):
        return LAYOUT.forward(self, hidden_states, m)

    x = modulate(hidden_states, self.norm1.norm, m.scale_msa, m.shift_msa)
    x = self.attn1(x, attention_mask=attention_mask, **(cross_attention_kwargs or {}))
    hidden_states = add_gated(hidden_states, m.gate_msa, x)

    return add_mlp(hidden_states, self.norm3, self.ff, m)


def _modulation(
    block: Any, timestep: torch.Tensor | None, labels: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """A block's modulation [B, 6 D] fp32."""
    norm = block.norm1
    rows: torch.Tensor = norm.linear(norm.silu(norm.emb(timestep, labels, hidden_dtype=dtype)))
    return rows


def _hoist(
    model: Any, timesteps: torch.Tensor, conditions: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The modulation of every block; see `Hoistable`."""
    (labels,), values = conditions, []
    for block in model.transformer_blocks:
        find_group(block, timesteps)
        values.append(_modulation(block, timesteps, labels, dtype))
    return values


def _labels(kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...] | None:
    labels = kwargs.get("class_labels")
    return None if labels is None else (labels,)


def use_direct_multiplier(block: nn.Module) -> None:
    """Give a stock block the forward above; it runs fused where it may."""
    swap_forward(block, _forward)
    make_fusible(block, LAYOUT)


def example_inputs(model: Any) -> dict[str, Any]:
    """One image, one timestep, one class: keyword arguments for a forward of `model`."""
    size, channels = model.config.sample_size, model.config.in_channels
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, channels, size, size, generator=generator)
    return {
        "hidden_states": latents.to(parameter.device, parameter.dtype),
        "timestep": torch.tensor([500], device=parameter.device),
        "class_labels": torch.tensor([0], device=parameter.device),
    }


BLOCK = BlockTable(
    sites=SITES,
    modulations={"norm1.linear": 6},
    use_direct_multiplier=use_direct_multiplier,
    attentions=("attn1",),
)

DIT = Family(
    architecture="DiTTransformer2DModel",
    block_tables=blocks_in(transformer_blocks=lambda block: BLOCK),
    kept={
        "norm1.emb": "timestep and label embedder: one row per image, kept float",
        "proj_out_2": "final projection, kept float",
    },
    example_inputs=example_inputs,
    shared_embedder="norm1.emb",
    hoistable=Hoistable(_labels, lambda model: list(model.transformer_blocks), _hoist),
    final_modulation="proj_out_1",
)

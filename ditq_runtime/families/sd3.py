"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206), as diffusers' SD3Transformer2DModel.

Chunks of `norm1.linear` and `norm1_context.linear`: as in DiT; a block with a second self-attention has its shift,
scale and gate behind them (6, 7, 8). The text stream ends in the last block, whose `norm1_context.linear` has 0 scale,
1 shift.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import nn
from torch.compiler import is_compiling

from ditq_runtime.families.adaln import (
    Modulation,
    add_gated,
    add_mlp,
    find_group,
    hoisted_rows,
    modulate,
    modulation,
    modulation_rows,
    swap_forward,
)
from ditq_runtime.families.family import BlockTable, Family, Hoistable, blocks_in
from ditq_runtime.families.fusible import layout_of, make_fusible, why_not
from ditq_runtime.families.joint import joint_sites
from ditq_runtime.families.sites import AdaLN, Site, ValueRows
from ditq_runtime.families.streams import (
    StreamsAttention,
    StreamsLayout,
    image_stream,
    text_stream,
)
from ditq_runtime.families.sublayers import FeedForwardLayer
from ditq_runtime.layers.linear import QuantLinear

CAPTION_TOKENS = 8

SECOND_ATTENTION = (
    Site("qkv2", ("attn2.to_q", "attn2.to_k", "attn2.to_v"), AdaLN("norm1.linear", 6, 7)),
    Site("o_proj2", ("attn2.to_out.0",), ValueRows(("attn2.to_v",))),
)


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """One SD3 block whose modulation linears emit the AdaLN multipliers; diffusers' signature."""
    find_group(self)
    kwargs = joint_attention_kwargs or {}
    rows = modulation_rows(self.norm1, temb).chunk(9 if self.use_dual_attention else 6, dim=1)
    image, second = Modulation(*rows[:6]), rows[6:]
    text: Modulation | None = None
    if self.context_pre_only:
        scale, shift = modulation_rows(self.norm1_context, temb).chunk(2, dim=1)
    else:
        text = modulation(self.norm1_context, temb)
        scale, shift = text.scale_msa, text.shift_msa
    if not (kwargs or is_compiling() or why_not(self)):
        layout: Any = layout_of(self)
        hidden = (hidden_states, encoder_hidden_states)
        made = layout.forward(self, hidden, (image, text or (shift, scale, None)), second=second)
        return None if text is None else made[1], made[0]
    attended, context = self.attn(
        hidden_states=modulate(hidden_states, self.norm1.norm, image.scale_msa, image.shift_msa),
        encoder_hidden_states=modulate(
            encoder_hidden_states, self.norm1_context.norm, scale, shift
        ),
        **kwargs,
    )
    before = hidden_states
    hidden_states = add_gated(hidden_states, image.gate_msa, attended)
    if self.use_dual_attention:
        shift2, scale2, gate2 = second
        x = self.attn2(hidden_states=modulate(before, self.norm1.norm, scale2, shift2), **kwargs)
        hidden_states = add_gated(hidden_states, gate2, x)
    hidden_states = add_mlp(hidden_states, self.norm2, self.ff, image)
    if text is None:
        return None, hidden_states
    encoder_hidden_states = add_gated(encoder_hidden_states, text.gate_msa, context)
    return add_mlp(encoder_hidden_states, self.norm2_context, self.ff_context, text), hidden_states


def use_direct_multiplier(block: nn.Module) -> None:
    """Give a stock block the forward above."""
    swap_forward(block, _forward)
    made: Any = block
    make_fusible(block, _layout(made.context_pre_only, made.use_dual_attention))


@cache
def _layout(ends: bool, dual: bool) -> StreamsLayout:
    """What a block is made of: the text stream ends there, it has a second attention."""
    image, text = image_stream(), text_stream("" if ends else "to_add_out")
    context = None if ends else FeedForwardLayer("ff_context", "norm2_context")
    return StreamsLayout(
        {"norm1.linear": QuantLinear, "norm1_context.linear": QuantLinear},
        StreamsAttention("attn", Attention, JointAttnProcessor2_0, image, text),
        (FeedForwardLayer("ff", "norm2"), context),
        StreamsAttention("attn2", Attention, JointAttnProcessor2_0, image) if dual else None,
    )


def block_table(block: Any) -> BlockTable:
    """The table of one block: with or without a second attention, inside the model or last."""
    last = block.context_pre_only
    sites = joint_sites(1, 0, ends=True) if last else joint_sites()
    if block.use_dual_attention:
        sites += SECOND_ATTENTION
    modulations = {
        "norm1.linear": 9 if block.use_dual_attention else 6,
        "norm1_context.linear": 2 if last else 6,
    }
    attentions = ("attn", "attn2") if block.use_dual_attention else ("attn",)
    return BlockTable(
        sites,
        modulations,
        use_direct_multiplier=use_direct_multiplier,
        attentions=attentions,
    )


def _norms(model: Any) -> dict[nn.Module, list[Any]]:
    """The blocks, and the AdaLNs of each that look for a hoisted value."""
    return {block: [block.norm1, block.norm1_context] for block in model.transformer_blocks}


def _hoist(
    model: Any, timesteps: torch.Tensor, conditions: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The modulation of every block, from the embedding that the model makes; see `Hoistable`."""
    return hoisted_rows(_norms(model), timesteps, model.time_text_embed(timesteps, *conditions))


def _conditions(kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...] | None:
    pooled = kwargs.get("pooled_projections")
    return None if pooled is None else (pooled,)


def example_inputs(model: Any) -> dict[str, Any]:
    """One image, one timestep, a random caption: keyword arguments for a forward of `model`."""
    config, parameter = model.config, next(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(parameter.device, parameter.dtype)

    return {
        "hidden_states": randn(1, config.in_channels, config.sample_size, config.sample_size),
        "encoder_hidden_states": randn(1, CAPTION_TOKENS, config.joint_attention_dim),
        "pooled_projections": randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([500.0], device=parameter.device),
    }


SD3 = Family(
    architecture="SD3Transformer2DModel",
    block_tables=blocks_in(transformer_blocks=block_table),
    kept={
        "time_text_embed": "timestep and pooled text embedder: one row per image, kept float",
        "context_embedder": "caption projection: outside the blocks, kept float",
        "proj_out": "final projection, kept float",
    },
    example_inputs=example_inputs,
    hoistable=Hoistable(
        _conditions,
        lambda model: [norm for norms in _norms(model).values() for norm in norms],
        _hoist,
    ),
    final_modulation="norm_out.linear",
)

"""PixArt-alpha and -sigma (arXiv:2310.00426, 2403.04692), as diffusers' PixArtTransformer2DModel.

One projection of the timestep serves all blocks, and each adds a table of its own (adaLN-single). Chunks of both:
0 shift_msa, 1 scale_msa, 2 gate_msa, 3 shift_mlp, 4 scale_mlp, 5 gate_mlp.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormSingle
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
from ditq_runtime.families.sublayers import CrossAttention, FeedForwardLayer, SelfAttention
from ditq_runtime.layers.modulation_table import ModulationTable

TABLE = "scale_shift_table"
CAPTION_TOKENS = 8
CONDITIONS = ("resolution", "aspect_ratio")

SITES = (
    Site("qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), AdaLN(TABLE, 0, 1)),
    Site("o_proj", ("attn1.to_out.0",), ValueRows(("attn1.to_v",))),
    Site(
        "xattn_q",
        ("attn2.to_q",),
        OnTheFly("it reads the residual stream itself, which no norm of the block makes", "X"),
    ),
    Site(
        "xattn_kv",
        ("attn2.to_k", "attn2.to_v"),
        OnTheFly("it reads the caption, which nothing in the block makes", "X"),
    ),
    Site("xattn_o", ("attn2.to_out.0",), ValueRows(("attn2.to_v",))),
    Site("fc1", ("ff.net.0.proj",), AdaLN(TABLE, 3, 4)),
    Site("fc2", ("ff.net.2",), OnTheFly(BEHIND_GELU)),
)
LAYOUT = Layout(
    {TABLE: ModulationTable},
    SelfAttention("attn1", norm="norm1"),
    CrossAttention("attn2"),
    FeedForwardLayer("ff", norm="norm2"),
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
    """One PixArt block whose table emits the AdaLN multiplier; diffusers' signature, `timestep` is the projection."""
    kwargs = cross_attention_kwargs or {}
    if kwargs.get("gligen") is not None:
        raise ValueError("PixArt blocks run no GLIGEN control; leave cross_attention_kwargs out")
    find_group(self)
    rows = hoisted(self)
    if rows is None:
        assert timestep is not None
        rows = self.scale_shift_table(timestep.reshape(hidden_states.shape[0], -1))
    m = Modulation(*rows.chunk(6, dim=1))

    plain = attention_mask is None and encoder_hidden_states is not None and not kwargs
    if plain and not why_not(self):
        return LAYOUT.forward(self, hidden_states, m, encoder_hidden_states, encoder_attention_mask)

    x = modulate(hidden_states, self.norm1, m.scale_msa, m.shift_msa)
    x = self.attn1(x, attention_mask=attention_mask, **kwargs)
    hidden_states = add_gated(hidden_states, m.gate_msa, x)

    hidden_states = hidden_states + self.attn2(
        hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        attention_mask=encoder_attention_mask,
        **kwargs,
    )
    return add_mlp(hidden_states, self.norm2, self.ff, m)


def _adaln_single(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The shared modulation [B, 6 D] and the embedding [B, D] that it is a projection of; diffusers' signature."""
    rows = hoisted(self)
    if rows is None:
        return AdaLayerNormSingle.forward(self, *args, **kwargs)
    *shared, embedding = rows.chunk(7, dim=1)
    return torch.cat(shared, dim=1), embedding


def _holders(model: Any) -> list[nn.Module]:
    """The shared modulation, with the forward above, then the blocks."""
    if type(model.adaln_single) is AdaLayerNormSingle:
        swap_forward(model.adaln_single, _adaln_single)
    return [model.adaln_single, *model.transformer_blocks]


def _hoist(
    model: Any, timesteps: torch.Tensor, conditions: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> list[torch.Tensor]:
    """What the shared modulation gives, and every block's own; see `Hoistable`."""
    added = dict(zip(CONDITIONS, conditions or (None, None), strict=True))
    shared, embedding = model.adaln_single(
        timesteps, added, batch_size=len(timesteps), hidden_dtype=dtype
    )
    values = [torch.cat([shared, embedding], dim=1)]
    for block in model.transformer_blocks:
        find_group(block, timesteps)
        values.append(block.scale_shift_table(shared))
    return values


def _conditions(kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Resolution and aspect ratio, where the model is told them."""
    added = kwargs.get("added_cond_kwargs") or {}
    return tuple(added[name] for name in CONDITIONS if added.get(name) is not None)


def use_direct_multiplier(block: nn.Module) -> None:
    """Give a stock block the forward above; it runs fused where it may. Its table must be a `ModulationTable`."""
    swap_forward(block, _forward)
    make_fusible(block, LAYOUT)


def example_inputs(model: Any) -> dict[str, Any]:
    """One image, one timestep, a random caption: keyword arguments for a forward of `model`."""
    config, parameter = model.config, next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    caption = config.caption_channels or model.inner_dim
    added: dict[str, Any] = dict.fromkeys(CONDITIONS)
    if model.use_additional_conditions:
        pixels = 8.0 * config.sample_size
        added = {
            "resolution": torch.tensor([[pixels, pixels]]).to(parameter.device, parameter.dtype),
            "aspect_ratio": torch.tensor([[1.0]]).to(parameter.device, parameter.dtype),
        }

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(parameter.device, parameter.dtype)

    return {
        "hidden_states": randn(*shape),
        "encoder_hidden_states": randn(1, CAPTION_TOKENS, caption),
        "timestep": torch.tensor([500], device=parameter.device),
        "added_cond_kwargs": added,
    }


BLOCK = BlockTable(
    sites=SITES,
    tables={TABLE: 6},
    use_direct_multiplier=use_direct_multiplier,
    attentions=("attn1", "attn2"),
)

PIXART = Family(
    architecture="PixArtTransformer2DModel",
    block_tables=blocks_in(transformer_blocks=lambda block: BLOCK),
    kept={
        "adaln_single": "timestep embedder and shared modulation: one row per image, kept float",
        "caption_projection": "caption projection: outside the blocks, kept float",
        "proj_out": "final projection, kept float",
    },
    example_inputs=example_inputs,
    hoistable=Hoistable(_conditions, _holders, _hoist),
)

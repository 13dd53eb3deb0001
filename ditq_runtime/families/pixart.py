"""PixArt-alpha and -sigma (arXiv:2310.00426, 2403.04692), as diffusers' PixArtTransformer2DModel.

One projection of the timestep serves all blocks, and each adds a table of its own (adaLN-single). Chunks of both:
0 shift_msa, 1 scale_msa, 2 gate_msa, 3 shift_mlp, 4 scale_mlp, 5 gate_mlp.
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
    modulate,
    swap_forward,
)
from ditq_runtime.families.family import BlockTable, Family, blocks_in
from ditq_runtime.families.sites import BEHIND_GELU, AdaLN, OnTheFly, Site, ValueRows

TABLE = "scale_shift_table"
CAPTION_TOKENS = 8

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
    assert timestep is not None
    kwargs = cross_attention_kwargs or {}
    if kwargs.get("gligen") is not None:
        raise ValueError("PixArt blocks run no GLIGEN control; leave cross_attention_kwargs out")
    find_group(self)
    shared = timestep.reshape(hidden_states.shape[0], -1)  # [B, 6 D]
    m = Modulation(*self.scale_shift_table(shared).chunk(6, dim=1))

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


def use_direct_multiplier(block: nn.Module) -> None:
    """Give a stock block the forward above; its table must be a `ModulationTable` when it runs."""
    swap_forward(block, _forward)


def example_inputs(model: Any) -> dict[str, Any]:
    """One image, one timestep, a random caption: keyword arguments for a forward of `model`."""
    config, parameter = model.config, next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    caption = config.caption_channels or model.inner_dim
    added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
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
)

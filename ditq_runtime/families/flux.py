"""Flux.1, as diffusers' FluxTransformer2DModel: blocks with two streams, then blocks with one.

Chunks of `norm1.linear` and `norm1_context.linear`: as in DiT. A block with one stream has `norm.linear`: 0 shift,
1 scale, 2 gate; its attention and its MLP read one input, and its output projection reads both outputs side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import nn
from torch.compiler import is_compiling

from ditq_runtime.families.adaln import (
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
from ditq_runtime.families.fused import Parts
from ditq_runtime.families.fusible import make_fusible, why_not
from ditq_runtime.families.joint import joint_sites
from ditq_runtime.families.parallel import ParallelLayer
from ditq_runtime.families.sites import AdaLN, Site, ValueRows
from ditq_runtime.families.streams import (
    StreamsAttention,
    StreamsLayout,
    image_stream,
    text_stream,
)
from ditq_runtime.families.sublayers import FeedForwardLayer
from ditq_runtime.layers.linear import QuantLinear

CAPTION_TOKENS, IMAGE_SIDE = 8, 4
FP16_MAX = 65504
DOUBLE_LAYOUT = StreamsLayout(
    {"norm1.linear": QuantLinear, "norm1_context.linear": QuantLinear},
    StreamsAttention("attn", FluxAttention, FluxAttnProcessor, text_stream(), image_stream()),
    (FeedForwardLayer("ff_context", "norm2_context"), FeedForwardLayer("ff", "norm2")),
)
SINGLE_LAYER = ParallelLayer("proj_mlp", "act_mlp", "proj_out")
SINGLE_LAYOUT = Parts({"norm.linear": QuantLinear}, SINGLE_LAYER)

SINGLE_SITES = (
    Site(
        "qkv_fc1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), AdaLN("norm.linear", 0, 1)
    ),
    Site(
        "out",
        ("proj_out",),
        ValueRows(
            ("attn.to_v",), rest="they are the output of GELU, which no factor passes through"
        ),
    ),
)


def _double_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block with two streams whose modulation linears emit the AdaLN multipliers; diffusers' signature."""
    find_group(self)
    inside = self._modules
    image, text = modulation(inside["norm1"], temb), modulation(inside["norm1_context"], temb)
    if not (joint_attention_kwargs or is_compiling() or why_not(self)):
        hidden = (encoder_hidden_states, hidden_states)
        context, hidden_states = DOUBLE_LAYOUT.forward(
            self, hidden, (text, image), image_rotary_emb
        )
        return _clip(context), hidden_states
    attended, context, *from_adapter = self.attn(
        hidden_states=modulate(hidden_states, self.norm1.norm, image.scale_msa, image.shift_msa),
        encoder_hidden_states=modulate(
            encoder_hidden_states, self.norm1_context.norm, text.scale_msa, text.shift_msa
        ),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    hidden_states = add_gated(hidden_states, image.gate_msa, attended)
    hidden_states = add_mlp(hidden_states, self.norm2, self.ff, image)
    for output in from_adapter:  # an IP-Adapter's
        hidden_states = (hidden_states + output).to(hidden_states.dtype)
    encoder_hidden_states = add_gated(encoder_hidden_states, text.gate_msa, context)
    encoder_hidden_states = add_mlp(
        encoder_hidden_states, self.norm2_context, self.ff_context, text
    )
    return _clip(encoder_hidden_states), hidden_states


def _single_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block with one stream whose modulation linear emits the AdaLN multiplier; diffusers' signature."""
    find_group(self)
    text_tokens = encoder_hidden_states.shape[1]
    hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = modulation_rows(self._modules["norm"], temb).chunk(3, dim=1)
    if not (joint_attention_kwargs or is_compiling() or why_not(self)):
        adaln = (shift, scale, gate)
        hidden_states = _clip(SINGLE_LAYER.forward(self, hidden_states, adaln, image_rotary_emb))
        return hidden_states[:, :text_tokens], hidden_states[:, text_tokens:]
    x = modulate(hidden_states, self.norm.norm, scale, shift)
    attended = self.attn(
        hidden_states=x, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    x = self.proj_out(torch.cat([attended, self.act_mlp(self.proj_mlp(x))], dim=2))
    hidden_states = _clip(add_gated(hidden_states, gate, x))
    return hidden_states[:, :text_tokens], hidden_states[:, text_tokens:]


def _clip(hidden_states: torch.Tensor) -> torch.Tensor:
    """As in diffusers: fp16 may overflow."""
    if hidden_states.dtype == torch.float16:
        return hidden_states.clip(-FP16_MAX, FP16_MAX)
    return hidden_states


def use_direct_multiplier_double(block: nn.Module) -> None:
    """Give a stock block with two streams the forward above."""
    swap_forward(block, _double_forward)
    make_fusible(block, DOUBLE_LAYOUT)


def use_direct_multiplier_single(block: nn.Module) -> None:
    """Give a stock block with one stream the forward above."""
    swap_forward(block, _single_forward)
    make_fusible(block, SINGLE_LAYOUT)


def _norms(model: Any) -> dict[nn.Module, list[Any]]:
    """The blocks, and the AdaLNs of each that look for a hoisted value."""
    double = {block: [block.norm1, block.norm1_context] for block in model.transformer_blocks}
    return double | {block: [block.norm] for block in model.single_transformer_blocks}


def _hoist(
    model: Any, timesteps: torch.Tensor, conditions: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The modulation of every block, from the embedding that the model makes; see `Hoistable`."""
    pooled, *guidance = conditions
    scaled = [x.to(dtype) * 1000 for x in (timesteps, *guidance)]
    return hoisted_rows(_norms(model), timesteps, model.time_text_embed(*scaled, pooled))


def _conditions(kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...] | None:
    pooled, guidance = kwargs.get("pooled_projections"), kwargs.get("guidance")
    if pooled is None or (guidance is not None and len(guidance) != len(pooled)):
        return None
    return (pooled,) if guidance is None else (pooled, guidance)


def example_inputs(model: Any) -> dict[str, Any]:
    """A small image, one timestep, a random caption: keyword arguments for a forward of `model`."""
    config, parameter = model.config, next(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(parameter.device, parameter.dtype)

    def randn(*size: int) -> torch.Tensor:
        return place(torch.randn(*size, generator=generator))

    ids = torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(IMAGE_SIDE))] * 2)
    inputs = {
        "hidden_states": randn(1, IMAGE_SIDE**2, config.in_channels),
        "encoder_hidden_states": randn(1, CAPTION_TOKENS, config.joint_attention_dim),
        "pooled_projections": randn(1, config.pooled_projection_dim),
        "timestep": place(torch.tensor([0.5])),
        "img_ids": place(ids),
        "txt_ids": place(torch.zeros(CAPTION_TOKENS, 3)),
    }
    if config.guidance_embeds:
        inputs["guidance"] = place(torch.tensor([3.5]))
    return inputs


DOUBLE = BlockTable(
    sites=joint_sites(),
    modulations={"norm1.linear": 6, "norm1_context.linear": 6},
    use_direct_multiplier=use_direct_multiplier_double,
    attentions=("attn",),
)
SINGLE = BlockTable(
    sites=SINGLE_SITES,
    modulations={"norm.linear": 3},
    use_direct_multiplier=use_direct_multiplier_single,
    attentions=("attn",),
)

FLUX = Family(
    architecture="FluxTransformer2DModel",
    block_tables=blocks_in(
        transformer_blocks=lambda block: DOUBLE, single_transformer_blocks=lambda block: SINGLE
    ),
    kept={
        "time_text_embed": "timestep, guidance and pooled text embedder: one row per image, kept float",
        "context_embedder": "caption projection: outside the blocks, kept float",
        "x_embedder": "patch embedding, kept float",
        "proj_out": "final projection, kept float",
    },
    example_inputs=example_inputs,
    hoistable=Hoistable(
        _conditions,
        lambda model: [norm for norms in _norms(model).values() for norm in norms],
        _hoist,
        argument=lambda timesteps: timesteps / 1000,
    ),
    final_modulation="norm_out.linear",
    timestep_scale=1e-3,  # the pipeline passes sigma in [0, 1]
)

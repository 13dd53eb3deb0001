"""Tiny configurations of the classes that draw videos from a text, some with sound or with given frames."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro

from ditq_bench.zoo.tiny import HEADS, LATENTS, ROPE, SIDE, TEXT, WIDTH, Draw, Tiny

FRAMES = 2
GRID = (FRAMES, SIDE // 2, SIDE // 2)  # patches of one by two by two latents
PATCHES = FRAMES * (SIDE // 2) ** 2
CHANNELS = {"in_channels": LATENTS, "out_channels": LATENTS}


def latents(draw: Draw, scale: float = 1000.0, channels: int = LATENTS) -> dict[str, Any]:
    """What most classes take: latents [B, C, F, H, W], a text, timesteps up to `scale`."""
    return {
        "hidden_states": draw.normal(channels, FRAMES, SIDE, SIDE),
        "encoder_hidden_states": draw.text(),
        "timestep": draw.times(scale),
    }


def masked(draw: Draw) -> dict[str, Any]:
    """Latents and a text of which each sample uses another length."""
    return {**latents(draw), "encoder_attention_mask": draw.mask()}


def from_image(draw: Draw) -> dict[str, Any]:
    """With what a vision tower saw of the first frame; Wan tells it from the text by the text's 512 tokens."""
    text = draw.text(tokens=512)
    return {
        **latents(draw),
        "encoder_hidden_states": text,
        "encoder_hidden_states_image": draw.text(),
    }


def cogvideox(draw: Draw) -> dict[str, Any]:
    """Frames before channels."""
    side = SIDE // 2
    turns = get_3d_rotary_pos_embed(
        WIDTH // 2, ((0, 0), (side, side)), (side, side), temporal_size=FRAMES
    )
    return {
        **latents(draw),
        "hidden_states": draw.normal(FRAMES, LATENTS, SIDE, SIDE),
        "image_rotary_emb": turns,
    }


def _allegro(draw: Draw) -> dict[str, Any]:
    side = SIDE // 2
    *turns, time, height, width = get_3d_rotary_pos_embed_allegro(
        24, ((0, 0), (side, side)), (side, side), FRAMES
    )
    positions = torch.cartesian_prod(time.long(), height.long(), width.long())  # [PATCHES, 3]
    return {
        **masked(draw),
        "attention_mask": torch.ones(draw.batch, FRAMES, SIDE, SIDE),
        "image_rotary_emb": (tuple(turns), tuple(positions.T[:, None])),
    }


def ltx(draw: Draw) -> dict[str, Any]:
    """Patches of one latent each, and their numbers in time, height and width."""
    frames, side = FRAMES, SIDE // 2
    return {
        **masked(draw),
        "hidden_states": draw.normal(PATCHES, 4 * LATENTS),
        **{"num_frames": frames, "height": side, "width": side},
    }


def hunyuan(draw: Draw) -> dict[str, Any]:
    """With a pooled text and the guidance that the model was distilled for."""
    guidance = draw.constant(6000.0)[:, 0]
    return {**masked(draw), "pooled_projections": draw.normal(WIDTH), "guidance": guidance}


def _kandinsky5(draw: Draw) -> dict[str, Any]:
    """Channels last."""
    return {
        **latents(draw),
        "hidden_states": draw.normal(FRAMES, SIDE, SIDE, LATENTS),
        "pooled_projections": draw.normal(WIDTH),
        "visual_rope_pos": [torch.arange(size) for size in GRID],
        "text_rope_pos": torch.arange(TEXT),
    }


def _anyflow(draw: Draw) -> dict[str, Any]:
    """Frames before channels; each frame has a timestep, and one that it is to reach."""
    times = draw.times(1000)[:, None].expand(-1, FRAMES)
    return {
        "hidden_states": draw.normal(FRAMES, LATENTS, SIDE, SIDE),
        "encoder_hidden_states": draw.text(),
        "timestep": times,
        "r_timestep": times / 2,
    }


def _wan22(draw: Draw) -> dict[str, Any]:
    """One timestep for each patch, as Wan 2.2 does when the first frame is given: that one stands at 0."""
    times = draw.times(1000.0)[:, None].repeat(1, PATCHES)
    times[:, : PATCHES // FRAMES] = 0
    return {**latents(draw), "timestep": times}


WAN = {
    **HEADS,
    **CHANNELS,
    "text_dim": WIDTH,
    "freq_dim": WIDTH,
    "ffn_dim": 2 * WIDTH,
    "num_layers": 2,
}
_SIZE = {"sample_width": SIDE, "sample_height": SIDE}
COGVIDEOX = {
    **HEADS, **CHANNELS, **_SIZE, "time_embed_dim": WIDTH, "text_embed_dim": WIDTH, "num_layers": 2,
    "sample_frames": 5, "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True,
}  # fmt: skip
HUNYUAN = {
    **HEADS, **CHANNELS, "num_layers": 2, "num_single_layers": 2, "text_embed_dim": WIDTH,
    "pooled_projection_dim": WIDTH, "rope_axes_dim": ROPE,
}  # fmt: skip
KANDINSKY = {
    "in_visual_dim": LATENTS, "out_visual_dim": LATENTS, "time_dim": WIDTH, "model_dim": WIDTH,
    "ff_dim": 2 * WIDTH, "num_visual_blocks": 2, "axes_dims": ROPE,
}  # fmt: skip
KANDINSKY_TEXT = {"in_text_dim": WIDTH, "in_text_dim2": WIDTH, "num_text_blocks": 2}

# class, configuration, arguments of forward, timestep
_ROWS: list[tuple] = [
    ("AllegroTransformer3DModel", {
        "num_attention_heads": 8, "attention_head_dim": 24, **CHANNELS, **_SIZE, "sample_frames": FRAMES,
        "num_layers": 2, "cross_attention_dim": 192, "caption_channels": WIDTH,
    }, _allegro),
    ("AnyFlowTransformer3DModel", WAN,
     _anyflow, ("timestep", "r_timestep")),
    ("ChronoEditTransformer3DModel", {**WAN, "image_dim": WIDTH, "added_kv_proj_dim": WIDTH}, from_image),
    ("CogVideoXTransformer3DModel", COGVIDEOX, cogvideox),
    ("CosmosTransformer3DModel", {
        **HEADS, **CHANNELS, "num_layers": 2, "text_embed_dim": WIDTH, "adaln_lora_dim": WIDTH,
        "max_size": (4, 16, 16), "concat_padding_mask": False,
    }, lambda draw: latents(draw) | {"fps": 30}),
    ("EasyAnimateTransformer3DModel", {
        **HEADS, **CHANNELS, **_SIZE, "patch_size": 2, "num_layers": 2, "mmdit_layers": 1, "time_embed_dim": WIDTH,
        "text_embed_dim": WIDTH, "add_norm_text_encoder": True,
    }, latents),
    ("HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan),
    ("Kandinsky5Transformer3DModel", {**KANDINSKY, **KANDINSKY_TEXT}, _kandinsky5),
    ("Kandinsky6SRTransformer3DModel", KANDINSKY,
     lambda draw: {
         "hidden_states": draw.normal(FRAMES, SIDE, SIDE, 2 * LATENTS + 1), "timestep": draw.times(1000)}),
    ("LatteTransformer3DModel", {
        **HEADS, **CHANNELS, "num_layers": 2, "cross_attention_dim": WIDTH, "attention_bias": True,
        "sample_size": SIDE, "patch_size": 2, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6,
        "caption_channels": WIDTH, "video_length": FRAMES,
    }, latents),
    ("LTXVideoTransformer3DModel", {
        **HEADS, "in_channels": 4 * LATENTS, "out_channels": 4 * LATENTS, "cross_attention_dim": WIDTH,
        "num_layers": 2, "caption_channels": WIDTH,
    }, ltx),
    ("MochiTransformer3DModel", {
        "num_attention_heads": 6, "attention_head_dim": 32, "in_channels": LATENTS, "num_layers": 2,
        "pooled_projection_dim": 3 * WIDTH, "text_embed_dim": WIDTH,
        "time_embed_dim": WIDTH, "max_sequence_length": TEXT,
    }, masked),
    ("SanaVideoTransformer3DModel", {
        **HEADS, **CHANNELS, "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32,
        "cross_attention_dim": WIDTH, "caption_channels": WIDTH, "mlp_ratio": 2.0, "sample_size": SIDE,
    }, masked),
    ("SkyReelsV2Transformer3DModel", WAN, latents),
    ("WanTransformer3DModel", WAN, _wan22),
]  # fmt: skip
VIDEO = [Tiny(*row) for row in _ROWS]

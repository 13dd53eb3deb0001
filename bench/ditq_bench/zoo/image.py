"""Tiny configurations of the classes that draw images, one text in, one image out."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import (
    get_2d_rotary_pos_embed,
    get_2d_rotary_pos_embed_lumina,
)

from ditq_bench.zoo.tiny import (
    HEADS,
    LATENTS,
    ROPE,
    SIDE,
    TEXT,
    WIDTH,
    Draw,
    Tiny,
)

PATCHES = (SIDE // 2) ** 2  # of two by two latents
SAMPLE = {"sample_size": SIDE, "patch_size": 2, "in_channels": LATENTS}


def _latents(draw: Draw, scale: float = 1.0) -> dict[str, Any]:
    """What most classes take: latents, a text, timesteps up to `scale`."""
    return {
        "hidden_states": draw.normal(LATENTS, SIDE, SIDE),
        "encoder_hidden_states": draw.text(),
        "timestep": draw.times(scale),
    }


def _sizes(draw: Draw, *names: str) -> dict[str, Any]:
    """Heights and widths in pixels, which CogView and its kin embed."""
    values = {"original_size": (64, 64), "target_size": (48, 64), "crop_coords": (0, 8)}
    return {name: draw.constant(*map(float, values[name])) for name in names}


def _cogview(draw: Draw) -> dict[str, Any]:
    return _latents(draw, 1000) | _sizes(draw, "original_size", "target_size", "crop_coords")


def _glm(draw: Draw) -> dict[str, Any]:
    prior = {
        "prior_token_id": draw.integers(32, PATCHES),
        "prior_token_drop": torch.zeros(draw.batch, dtype=torch.bool),
    }
    return _latents(draw, 1000) | _sizes(draw, "target_size", "crop_coords") | prior


def _hunyuan_dit(draw: Draw) -> dict[str, Any]:
    side = SIDE // 2
    turns = get_2d_rotary_pos_embed(
        WIDTH // 2, ((0, 0), (side, side)), (side, side), output_type="pt"
    )
    return {
        **_latents(draw, 1000),
        "text_embedding_mask": draw.mask().long(),
        "encoder_hidden_states_t5": draw.text(),
        "text_embedding_mask_t5": draw.mask().long(),
        "image_meta_size": draw.constant(64.0, 64.0, 64.0, 64.0, 0.0, 0.0),
        "style": torch.zeros(draw.batch, dtype=torch.long),
        "image_rotary_emb": turns,
    }


def _lumina_next(draw: Draw) -> dict[str, Any]:
    turns = get_2d_rotary_pos_embed_lumina(WIDTH // 2, SIDE, SIDE)
    return {
        **_latents(draw),
        "encoder_mask": draw.mask().long(),
        "image_rotary_emb": turns,
        "cross_attention_kwargs": {},
    }


def _hidream(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(LATENTS, SIDE, SIDE),
        "timesteps": draw.times(1000),
        "encoder_hidden_states_t5": draw.text(),
        "encoder_hidden_states_llama3": torch.stack([draw.text() for _ in range(2)]),
        "pooled_embeds": draw.normal(WIDTH),
    }


def _omnigen(draw: Draw) -> dict[str, Any]:
    """Text, timestep and image in one sequence: causal up to the image, which sees itself too."""
    length = TEXT + 1 + PATCHES
    seen = torch.ones(length, length).tril()
    seen[TEXT + 1 :, TEXT + 1 :] = 1
    return {
        "hidden_states": draw.normal(LATENTS, SIDE, SIDE),
        "timestep": draw.times(),
        "input_ids": draw.integers(32, TEXT),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": seen.expand(draw.batch, -1, -1),
        "position_ids": torch.arange(length).expand(draw.batch, -1),
    }


def _joy_plus(draw: Draw) -> dict[str, Any]:
    """Patches of two images per sample, the one to edit last."""
    return {
        "hidden_states": draw.normal(2 * PATCHES, LATENTS, 1, 2, 2),
        "timestep": draw.times(1000),
        "encoder_hidden_states": draw.text(),
        "encoder_hidden_states_mask": draw.mask().float(),
        "shape_list": [[(1, SIDE // 2, SIDE // 2)] * 2] * draw.batch,
    }


def _z_image(draw: Draw) -> dict[str, Any]:
    """Lists of samples; captions differ in length."""
    return {
        "x": list(draw.normal(LATENTS, 1, SIDE, SIDE)),
        "t": draw.times(),
        "cap_feats": [draw.text()[0][: TEXT - i] for i in range(draw.batch)],
    }


_PIXART = {"resolution": None, "aspect_ratio": None}
_POOLED = {"pooled_projection_dim": WIDTH}
_COGVIEW = {
    **HEADS, "patch_size": 2, "in_channels": LATENTS, "out_channels": LATENTS, "num_layers": 2,
    "text_embed_dim": WIDTH, "time_embed_dim": WIDTH, "condition_dim": WIDTH,
}  # fmt: skip
_JOY = {
    "in_channels": LATENTS, "hidden_size": WIDTH, "num_attention_heads": 2, "text_dim": WIDTH,
    "num_layers": 2, "rope_dim_list": list(ROPE),
}  # fmt: skip
_Z_WIDTH = 192  # a feed-forward of these is 8/3 as wide

# class, configuration, arguments of forward, timestep
_ROWS: list[tuple] = [
    ("AuraFlowTransformer2DModel", {
        **HEADS, **SAMPLE, "out_channels": LATENTS, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": WIDTH, "pos_embed_max_size": 16,
    }, _latents),
    ("BriaFibo2Transformer2DModel", {
        "in_channels": LATENTS, "dim": _Z_WIDTH, "n_layers": 2, "n_heads": 6, "cap_feat_dim": WIDTH,
        "injection_layer_ids": (0, 1), "min_num_gist_tokens": 8, "max_num_gist_tokens": 16, "gist_step": 4,
        "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": ROPE, "axes_lens": (64, 16, 16),
    }, lambda draw: _latents(draw) | {
        "encoder_hidden_states": draw.normal(3, TEXT, WIDTH), "encoder_attention_mask": draw.mask()}),
    ("CogView3PlusTransformer2DModel",
     {**_COGVIEW, "pos_embed_max_size": 16, "sample_size": SIDE}, _cogview),
    ("CogView4Transformer2DModel", {
        **_COGVIEW, "pos_embed_max_size": 16, "sample_size": SIDE, "rope_axes_dim": (16, 16)}, _cogview),
    ("DiTTransformer2DModel", {**HEADS, **SAMPLE, "out_channels": 2 * LATENTS, "num_layers": 2},
     lambda draw: {
         "hidden_states": draw.normal(LATENTS, SIDE, SIDE), "timestep": draw.times(1000).long(),
         "class_labels": draw.integers(1000)}),
    ("ErnieImageTransformer2DModel", {
        "hidden_size": WIDTH, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 2 * WIDTH,
        "in_channels": LATENTS, "out_channels": LATENTS, "text_in_dim": 2 * WIDTH, "rope_axes_dim": ROPE,
    }, lambda draw: {
        "hidden_states": draw.normal(LATENTS, SIDE // 2, SIDE // 2), "timestep": draw.times(1000),
        "text_bth": draw.text(2 * WIDTH), "text_lens": draw.mask().sum(1)}),
    ("GlmImageTransformer2DModel", {**_COGVIEW, "prior_vq_quantizer_codebook_size": 32}, _glm),
    ("HiDreamImageTransformer2DModel", {
        **HEADS, "patch_size": 2, "in_channels": LATENTS, "num_layers": 2, "num_single_layers": 2,
        "caption_channels": [WIDTH, WIDTH], "text_emb_dim": WIDTH, "axes_dims_rope": ROPE,
        "max_resolution": (SIDE, SIDE), "llama_layers": [0, 1, 0, 1],
    }, _hidream, "timesteps"),
    ("HunyuanDiT2DModel", {
        **HEADS, **SAMPLE, "hidden_size": WIDTH, "num_layers": 4, "cross_attention_dim": WIDTH,
        "cross_attention_dim_t5": WIDTH, "pooled_projection_dim": WIDTH, "text_len": TEXT, "text_len_t5": TEXT,
    }, _hunyuan_dit),
    ("HunyuanImageTransformer2DModel", {
        **HEADS, "in_channels": LATENTS, "out_channels": LATENTS, "num_layers": 2, "num_single_layers": 2,
        "guidance_embeds": True, "text_embed_dim": WIDTH, "text_embed_2_dim": WIDTH, "rope_axes_dim": (16, 16),
    }, lambda draw: _latents(draw, 1000) | {
        "encoder_attention_mask": draw.mask(), "encoder_hidden_states_2": draw.text(),
        "encoder_attention_mask_2": draw.mask(), "guidance": draw.constant(3500.0)[:, 0]}),
    ("JoyImageEditTransformer3DModel", _JOY,
     lambda draw: {
         "hidden_states": draw.normal(2, LATENTS, 1, SIDE, SIDE), "timestep": draw.times(1000),
         "encoder_hidden_states": draw.text()}),
    ("JoyImageEditPlusTransformer3DModel", _JOY, _joy_plus),
    ("Lumina2Transformer2DModel", {
        **SAMPLE, "hidden_size": 2 * WIDTH, "num_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
        "multiple_of": WIDTH, "axes_dim_rope": ROPE, "axes_lens": (64, 16, 16), "cap_feat_dim": WIDTH,
    }, lambda draw: _latents(draw) | {"encoder_attention_mask": draw.mask()}),
    ("LuminaNextDiT2DModel", {
        **SAMPLE, "hidden_size": 2 * WIDTH, "num_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
        "multiple_of": WIDTH, "cross_attention_dim": WIDTH,
    }, _lumina_next),
    ("OmniGenTransformer2DModel", {
        "in_channels": LATENTS, "hidden_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 2 * WIDTH, "num_layers": 2, "pad_token_id": 0, "vocab_size": 32,
        "rope_scaling": {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16}, "pos_embed_max_size": 16,
        "time_step_dim": WIDTH,
    }, _omnigen),
    ("PixArtTransformer2DModel", {
        **HEADS, **SAMPLE, "out_channels": 2 * LATENTS, "num_layers": 2, "cross_attention_dim": WIDTH,
        "caption_channels": WIDTH,
        "use_additional_conditions": False,
    }, lambda draw: _latents(draw, 1000) | {
        "added_cond_kwargs": _PIXART, "encoder_attention_mask": draw.mask().long()}),
    ("PRXTransformer2DModel", {
        "in_channels": LATENTS, "context_in_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2.0, "num_heads": 2,
        "depth": 2, "axes_dim": [16, 16],
    }, lambda draw: _latents(draw) | {"attention_mask": draw.mask()}),
    ("SanaTransformer2DModel", {
        **HEADS, **SAMPLE, "out_channels": LATENTS, "num_layers": 2, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": WIDTH // 2, "cross_attention_dim": WIDTH, "caption_channels": WIDTH,
        "mlp_ratio": 2.0,
    }, lambda draw: _latents(draw, 1000) | {"encoder_attention_mask": draw.mask()}),
    ("SD3Transformer2DModel", {
        **HEADS, **SAMPLE, "out_channels": LATENTS, "num_layers": 2, "joint_attention_dim": WIDTH,
        "caption_projection_dim": WIDTH, **_POOLED, "pos_embed_max_size": 16, "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }, lambda draw: _latents(draw, 1000) | {"pooled_projections": draw.normal(WIDTH)}),
    ("ZImageTransformer2DModel", {
        "in_channels": LATENTS, "dim": _Z_WIDTH, "n_layers": 2, "n_heads": 6, "n_kv_heads": 6,
        "cap_feat_dim": WIDTH, "axes_dims": list(ROPE), "axes_lens": [128, 16, 16],
    }, _z_image, "t"),
]  # fmt: skip
IMAGE = [Tiny(*row) for row in _ROWS]

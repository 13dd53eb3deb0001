"""Tiny configurations of the classes that draw images and take them as patches in a row: Flux and its kin."""

from __future__ import annotations

from typing import Any

import torch

from ditq_bench.zoo.tiny import GROUPED, HEADS, LATENTS, ROPE, SIDE, TEXT, WIDTH, Draw, Tiny

PATCHES = (SIDE // 2) ** 2  # of two by two latents


def grid(coordinates: int = 3) -> torch.Tensor:
    """[PATCHES, coordinates] fp32: row and column of each patch in columns 1 and 2, zeros elsewhere."""
    ids = torch.zeros(PATCHES, coordinates)
    ids[:, 1] = torch.arange(PATCHES) // (SIDE // 2)
    ids[:, 2] = torch.arange(PATCHES) % (SIDE // 2)
    return ids


def _packed(draw: Draw, coordinates: int = 3, **more: Any) -> dict[str, Any]:
    """What Flux and its kin take: patches, a text, and the coordinates of both."""
    return {
        "hidden_states": draw.normal(PATCHES, 4 * LATENTS),
        "encoder_hidden_states": draw.text(),
        "timestep": draw.times(),
        "img_ids": grid(coordinates),
        "txt_ids": torch.zeros(TEXT, coordinates),
        **more,
    }


def _flux2_ids() -> dict[str, torch.Tensor]:
    """Four coordinates; a token of the text counts in the last."""
    text = torch.zeros(TEXT, 4)
    text[:, 3] = torch.arange(TEXT)
    return {"img_ids": grid(4), "txt_ids": text}


def _flux3(draw: Draw) -> dict[str, Any]:
    """With an image to edit, whose first coordinate tells it from the one that is drawn."""
    given = grid(4)
    given[:, 0] = 10
    condition = draw.normal(PATCHES, 4 * LATENTS)
    more = {"image_cond_hidden_states": condition, "image_cond_ids": given}
    return {**_packed(draw, 4), **_flux2_ids(), **more}


def _ideogram4(draw: Draw) -> dict[str, Any]:
    """One sequence: the text, then the image; each position carries one of the two and zeros of the other."""
    length = TEXT + PATCHES
    positions = torch.arange(length)[:, None].expand(-1, 3).clone()
    positions[TEXT:] = TEXT + grid().long()
    is_text = (torch.arange(length) < TEXT)[None, :, None]
    return {
        "hidden_states": draw.normal(length, 4 * LATENTS) * ~is_text,
        "timestep": draw.times(),
        "encoder_hidden_states": draw.text(tokens=length) * is_text,
        "position_ids": positions.expand(draw.batch, -1, -1),
        "segment_ids": torch.ones(draw.batch, length, dtype=torch.long),
        "indicator": torch.where(is_text[..., 0], 3, 2).expand(draw.batch, -1),
    }


def _krea2(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(PATCHES, 4 * LATENTS),
        "encoder_hidden_states": draw.normal(TEXT, 3, WIDTH),
        "timestep": draw.times(),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid()]),
        "encoder_attention_mask": draw.mask(),
    }


def _nucleus(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(PATCHES, 4 * LATENTS),
        "img_shapes": [(1, SIDE // 2, SIDE // 2)] * draw.batch,
        "encoder_hidden_states": draw.text(),
        "encoder_hidden_states_mask": draw.mask(),
        "timestep": draw.times(),
    }


def _qwen(draw: Draw) -> dict[str, Any]:
    """`img_shapes` lists every image of a sample."""
    given = _nucleus(draw)
    return {**given, "img_shapes": [[shape] for shape in given["img_shapes"]]}


def _qwen21(draw: Draw) -> dict[str, Any]:
    """An image to edit stands in the text, four patches a slot; the image that is drawn follows."""
    slots = PATCHES // 4
    is_image = torch.zeros(TEXT + 2 * slots, dtype=torch.bool)
    is_image[2 : 2 + slots] = is_image[TEXT + slots :] = True
    return {
        "hidden_states": draw.normal(2 * PATCHES, 4 * LATENTS),
        "encoder_hidden_states": draw.text(tokens=TEXT + slots),
        "timestep": draw.times(),
        "img_shapes": [[(1, SIDE // 2, SIDE // 2)] * 2] * draw.batch,
        "img_mask": is_image.expand(draw.batch, -1),
    }


_FLUX = {
    **HEADS,
    "num_layers": 2,
    "num_single_layers": 2,
    "axes_dims_rope": ROPE,
    "in_channels": 4 * LATENTS,
    "joint_attention_dim": WIDTH,
}
_QWEN = {
    **HEADS, "in_channels": 4 * LATENTS, "out_channels": LATENTS, "num_layers": 2,
    "axes_dims_rope": ROPE,
}  # fmt: skip
_POOLED = {"pooled_projection_dim": WIDTH}

# class, configuration, arguments of forward, timestep
_ROWS: list[tuple] = [
    ("BriaTransformer2DModel", {**_FLUX, "axes_dims_rope": list(ROPE)},
     lambda draw: _packed(draw, timestep=draw.times(1000))),
    ("BriaFiboTransformer2DModel", {**_FLUX, "axes_dims_rope": list(ROPE), "text_encoder_dim": WIDTH},
     lambda draw: _packed(
         draw, timestep=draw.times(1000), text_encoder_layers=[draw.text() for _ in range(4)])),
    ("ChromaTransformer2DModel", {
        **_FLUX, "approximator_num_channels": WIDTH, "approximator_hidden_dim": WIDTH, "approximator_layers": 2,
    }, lambda draw: _packed(
        draw, attention_mask=torch.cat([draw.mask(), draw.mask(PATCHES) | True], dim=1))),
    ("FluxTransformer2DModel", {**_FLUX, **_POOLED, "guidance_embeds": True},
     lambda draw: _packed(
         draw, pooled_projections=draw.normal(WIDTH), guidance=draw.constant(3.5)[:, 0])),
    ("Flux2Transformer2DModel", {
        **_FLUX, "timestep_guidance_channels": WIDTH, "axes_dims_rope": (8, 8, 8, 8)},
     lambda draw: _packed(draw, 4, **_flux2_ids(), guidance=draw.constant(3.5)[:, 0])),
    ("Flux3Transformer2DModel", {
        **_FLUX, "cond_in_channels": 4 * LATENTS, "timestep_channels": WIDTH, "axes_dims_rope": (8, 8, 8, 8)},
     _flux3),
    ("Ideogram4Transformer2DModel", {
        **HEADS, "in_channels": 4 * LATENTS, "num_layers": 2, "intermediate_size": 2 * WIDTH, "adaln_dim": WIDTH,
        "llm_features_dim": WIDTH, "mrope_section": (6, 5, 5),
    }, _ideogram4),
    ("Krea2Transformer2DModel", {
        **GROUPED, "attention_head_dim": 32, "in_channels": 4 * LATENTS, "num_layers": 2, "intermediate_size": 256,
        "timestep_embed_dim": WIDTH, "text_hidden_dim": WIDTH, "num_text_layers": 3, "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2, "text_intermediate_size": 2 * WIDTH, "axes_dims_rope": ROPE,
    }, _krea2),
    ("LongCatImageTransformer2DModel", {**_FLUX, **_POOLED, "axes_dims_rope": list(ROPE)}, _packed),
    ("NucleusMoEImageTransformer2DModel", {
        **_QWEN, **GROUPED, "joint_attention_dim": WIDTH, "num_experts": 4, "moe_intermediate_dim": WIDTH,
        "capacity_factors": 2.0, "dense_moe_strategy": "leave_first_block_dense", "num_layers": 3,
    }, _nucleus),
    ("OvisImageTransformer2DModel", {**_FLUX, "out_channels": 4 * LATENTS}, _packed),
    ("QwenImageTransformer2DModel", {**_QWEN, "joint_attention_dim": WIDTH}, _qwen),
    ("QwenImage21Transformer2DModel", {**_QWEN, "out_channels": 4 * LATENTS, "context_in_dim": WIDTH}, _qwen21),
]  # fmt: skip
IMAGE_PACKED = [Tiny(*row) for row in _ROWS]

"""The arguments of one forward for one image, as far as shapes go: what the classes with a table are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Arguments = dict[str, Any]
FLUX_TOKENS = 32 * 32  # 512 pixels; Flux's configuration names no size
PIXART_TEXT, SD3_TEXT, FLUX_TEXT = 300, 333, 512  # tokens that the pipelines pad a prompt to


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _latents(config: Any) -> Arguments:
    size = config.sample_size
    return {"hidden_states": _meta(1, config.in_channels, size, size), "timestep": _meta(1)}


def _dit(model: Any) -> Arguments:
    return {**_latents(model.config), "class_labels": torch.zeros(1, dtype=torch.int64)}


def _pixart(model: Any) -> Arguments:
    added: Arguments = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        added = {"resolution": _meta(1, 2), "aspect_ratio": _meta(1, 1)}
    width = model.config.caption_channels or model.inner_dim
    return {
        **_latents(model.config),
        "encoder_hidden_states": _meta(1, PIXART_TEXT, width),
        "encoder_attention_mask": _meta(1, PIXART_TEXT),
        "added_cond_kwargs": added,
    }


def _prompt(config: Any, tokens: int) -> Arguments:
    return {
        "encoder_hidden_states": _meta(1, tokens, config.joint_attention_dim),
        "pooled_projections": _meta(1, config.pooled_projection_dim),
    }


def _flux(model: Any) -> Arguments:
    config = model.config
    return {
        **_prompt(config, FLUX_TEXT),
        "hidden_states": _meta(1, FLUX_TOKENS, config.in_channels),
        "timestep": _meta(1),
        "guidance": _meta(1) if config.guidance_embeds else None,
        "txt_ids": _meta(FLUX_TEXT, 3),
        "img_ids": _meta(FLUX_TOKENS, 3),
    }


ONE_IMAGE: dict[str, Callable[[Any], Arguments]] = {  # model -> arguments, tensors on meta
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": lambda model: {
        **_latents(model.config),
        **_prompt(model.config, SD3_TEXT),
    },
    "FluxTransformer2DModel": _flux,
}

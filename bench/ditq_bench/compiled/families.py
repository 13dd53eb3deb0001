"""Blocks to count: a family's model with some number of them, at a width where everything that can fuse does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

import ditq_runtime as ditq
from ditq_bench.zoo import redraw

BATCH, SIDE, TEXT = 2, 16, 8
HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}  # width 128
IMAGES = {**HEADS, "in_channels": 4, "out_channels": 8, "sample_size": SIDE, "patch_size": 2}
ROPE = (8, 12, 12)


@dataclass(frozen=True)
class Block:
    """A kind of block.

    Attributes:
        model: the float model with a number of these blocks.
        inputs: arguments of its forward.
    """

    model: Callable[[int], Any]
    inputs: Callable[[], dict[str, Any]]


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(sum(shape)))


def _latents(channels: int = 4, *frames: int) -> dict[str, Any]:
    return {"hidden_states": _normal(channels, *frames, SIDE, SIDE), "timestep": _times(1000)}


def _times(scale: float) -> torch.Tensor:
    return torch.tensor([0.01, 0.9]) * scale


def _text() -> dict[str, Any]:
    return {"encoder_hidden_states": _normal(TEXT, 32)}


def _flux(double: int, single: int) -> Any:
    return diffusers.FluxTransformer2DModel(
        **HEADS, in_channels=16, num_layers=double, num_single_layers=single, joint_attention_dim=32,
        pooled_projection_dim=48, axes_dims_rope=ROPE, guidance_embeds=False,
    )  # fmt: skip


def _flux_inputs() -> dict[str, Any]:
    side = SIDE // 2
    places = torch.arange(float(side))
    return {
        "hidden_states": _normal(side * side, 16), **_text(), "pooled_projections": _normal(48),
        "timestep": _times(1), "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), places, places),
    }  # fmt: skip


def _qwen_inputs() -> dict[str, Any]:
    side = SIDE // 2
    return {
        "hidden_states": _normal(side * side, 16), **_text(), "encoder_hidden_states_mask": None,
        "timestep": _times(1), "img_shapes": [[(1, side, side)]] * BATCH,
    }  # fmt: skip


BLOCKS = {
    "DiT": Block(
        lambda count: diffusers.DiTTransformer2DModel(**IMAGES, num_layers=count),
        lambda: {**_latents(), "timestep": _times(1000).long(), "class_labels": torch.tensor([3, 7])},
    ),
    "PixArt": Block(
        lambda count: diffusers.PixArtTransformer2DModel(
            **IMAGES, num_layers=count, caption_channels=32, cross_attention_dim=128,
            use_additional_conditions=False,
        ),
        lambda: {
            **_latents(), **_text(), "encoder_attention_mask": torch.ones(BATCH, TEXT),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3": Block(
        lambda count: diffusers.SD3Transformer2DModel(
            **IMAGES | {"out_channels": 4, "sample_size": 2 * SIDE}, num_layers=count,
            joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=48,
            pos_embed_max_size=24,
        ),
        lambda: {**_latents(), **_text(), "pooled_projections": _normal(48)},
    ),
    "Flux double": Block(lambda count: _flux(count, 1), _flux_inputs),
    "Flux single": Block(lambda count: _flux(1, count), _flux_inputs),
    "Wan": Block(
        lambda count: diffusers.WanTransformer3DModel(
            **HEADS, patch_size=(1, 2, 2), in_channels=4, out_channels=4, text_dim=32, freq_dim=64,
            ffn_dim=256, num_layers=count, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
        lambda: {**_latents(4, 2), **_text()},
    ),
    "Qwen-Image": Block(
        lambda count: diffusers.QwenImageTransformer2DModel(
            **HEADS, patch_size=2, in_channels=16, out_channels=4, num_layers=count,
            joint_attention_dim=32, axes_dims_rope=ROPE,
        ),
        _qwen_inputs,
    ),
}  # fmt: skip


def build(block: Block, count: int, config: ditq.DitqConfig | None) -> Any:
    """A model in bf16 with `count` blocks: float, or quantized as the config says. Blocks are not fused by hand."""
    torch.manual_seed(0)
    source: Any = redraw(block.model(count))
    with tempfile.TemporaryDirectory() as folder:
        source.save_pretrained(folder)
        options = {} if config is None else {"quantization_config": config}
        model = type(source).from_pretrained(folder, torch_dtype=torch.bfloat16, **options)
    for (
        module
    ) in model.modules():  # loading left views of other dtypes, which Dynamo does not trace
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = None if buffer is None else buffer.detach().clone()
    if config is not None:
        ditq.configure(model, fuse=False)
    return model.eval().requires_grad_(False)


def arguments(block: Block) -> dict[str, Any]:
    """The arguments of a forward in bf16, where they are floats."""
    given = block.inputs()
    return {
        name: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in given.items()
    }

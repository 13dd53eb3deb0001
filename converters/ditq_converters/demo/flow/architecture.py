"""The flow model's transformer and scheduler: a small Flux, on the digits' pixels.

`FluxPipeline` packs 2 x 2 latents into one token, so an 8 x 8 image is 16 tokens of 4 channels. Two
joint blocks and four single ones, 128 wide, rotary embedding of (text, row, column) and RMS-normed
queries and keys, as in the large model. It is not told its guidance: that is run as true
classifier-free guidance, against the empty prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditq_converters.demo.flow.text import TEXT_WIDTH

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

TRANSFORMER_CONFIG = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "axes_dims_rope": (8, 12, 12),
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "guidance_embeds": False,
}

SCHEDULER_CONFIG = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False}


def build_transformer() -> FluxTransformer2DModel:
    """Build the transformer in eval mode, with diffusers' random weights (fp32)."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(**TRANSFORMER_CONFIG).eval()


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the Euler scheduler of rectified flow (arXiv:2209.03003), sigmas evenly spaced."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG)

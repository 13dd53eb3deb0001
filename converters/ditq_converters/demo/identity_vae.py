"""An AutoencoderKL that changes nothing but the size, so that a pixel model fits a DiTPipeline.

The demo's transformer works on pixels, while `DiTPipeline` wants a VAE. This one is an adapter
made by hand, not a trained model. It decodes a latent x [N, 1, 8, 8] to the same image enlarged
to [N, 1, 32, 32] by nearest neighbour, and encodes by taking every fourth pixel.

Why it is an identity. The eight inner channels carry

    conv_in:  h = (x, -x, +C, -C, 0, 0, 0, 0)

All other weights are zero, so every resnet adds zero to h, but an up block's convolution is a
centred delta after nearest-neighbour 2x, and a down block's takes the upper left pixel of each 2x2.
The last GroupNorm has one group, so it sees all channels at once:

    mean = 0 (the channels cancel in pairs),  variance = (2 x^2 + 2 C^2) / 8 ~ (C / 2)^2

where the x^2 stands for its mean over pixels. C is so large that the variance is a constant, and
multiplying by gamma = C / 2 undoes the division. SiLU is undone by a pair, as
sigmoid(a) + sigmoid(-a) = 1:

    conv_out:  silu(x) - silu(-x) = x sigmoid(x) + x sigmoid(-x) = x

Four zero channels make sqrt(8 / 2) = 2, so C and gamma are powers of two and exact in any float
format. Two errors are left: the variance's x^2 shrinks x by mean(x^2) / (2 C^2) of its size, which
is at most 2e-6 where |x| <= 1, and the norm's mean is rounded, the more the larger C is. Measured
in fp32, the two together are 7.6e-6 at C = 256, 1.9e-6 at 512 and 1.6e-6 at 1024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CONSTANT = 512.0  # C above

_CHANNELS = 8
_TINY_LOG_VARIANCE = -30.0  # diffusers' own lower clamp: the posterior is a point

VAE_CONFIG = {
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (_CHANNELS,) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "sample_size": 32,
    "scaling_factor": 1.0,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "force_upcast": False,
}


def _write_pairs(conv: nn.Conv2d) -> None:
    """Let conv_in map x to (x, -x, C, -C, 0, 0, 0, 0)."""
    conv.weight[0, 0, 1, 1], conv.weight[1, 0, 1, 1] = 1.0, -1.0
    assert conv.bias is not None
    conv.bias[2], conv.bias[3] = CONSTANT, -CONSTANT


def _read_pair(norm: nn.GroupNorm, conv: nn.Conv2d) -> None:
    """Let the last norm keep its input, and conv_out give silu(x) - silu(-x)."""
    norm.weight.fill_(CONSTANT / 2)
    conv.weight[0, 0, 1, 1], conv.weight[0, 1, 1, 1] = 1.0, -1.0


def _pass_through(conv: nn.Conv2d, row: int, column: int) -> None:
    """Let a 3x3 convolution pick one tap of every channel."""
    for channel in range(_CHANNELS):
        conv.weight[channel, channel, row, column] = 1.0


@torch.no_grad()
def build_identity_vae(**changes: float) -> AutoencoderKL:
    """Build the VAE (fp32, eval mode, scaling factor 1).

    Args:
        changes: of its configuration, for what a pipeline reads there (`shift_factor`).

    Returns:
        A model with decode: [N, 1, 8, 8] -> [N, 1, 32, 32] and encode: the reverse (its mode). For
        |x| <= 1 both err by at most 4e-6 in fp32; by 4e-3 in bf16 and 5e-4 in fp16, one rounding
        of the format, for x given in it. A step of an 8-bit image is 7.8e-3.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**{**VAE_CONFIG, **changes}).eval()
    for parameter in vae.parameters():
        parameter.zero_()
    for part in (vae.encoder, vae.decoder):
        _write_pairs(part.conv_in)
        _read_pair(part.conv_norm_out, part.conv_out)
    for block in vae.decoder.up_blocks[:-1]:
        _pass_through(block.upsamplers[0].conv, 1, 1)
    for block in vae.encoder.down_blocks[:-1]:
        _pass_through(block.downsamplers[0].conv, 0, 0)
    vae.encoder.conv_out.bias[1] = _TINY_LOG_VARIANCE
    return vae

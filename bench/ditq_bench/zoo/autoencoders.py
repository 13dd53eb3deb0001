"""Tiny autoencoders: two levels, few channels, latents of half the side of the picture where the class allows it."""

from __future__ import annotations

from typing import Any

import diffusers

from ditq_bench.zoo.tiny import LATENTS

_IMAGE = {
    "block_out_channels": (4, 4), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": LATENTS, "norm_num_groups": 2,
}  # fmt: skip
_WAN = {"base_dim": 4, "z_dim": LATENTS, "num_res_blocks": 1}


def image(**changes: Any) -> Any:
    """The autoencoder of Stable Diffusion, as SD3 and Flux have it."""
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1}
    return diffusers.AutoencoderKL(**{**_IMAGE, **plain, **changes})


def flux2() -> Any:
    """That of Flux.2, which normalises patches of two by two latents."""
    return diffusers.AutoencoderKLFlux2(**_IMAGE)


def qwen_image() -> Any:
    """That of QwenImage: a video autoencoder for one frame."""
    return diffusers.AutoencoderKLQwenImage(**_WAN, dim_mult=[1, 1], temperal_downsample=[False])


def wan() -> Any:
    """That of Wan: four times smaller, a quarter of the frames."""
    return diffusers.AutoencoderKLWan(
        **_WAN, dim_mult=[1, 1, 1], temperal_downsample=[True, True], scale_factor_spatial=4
    )


def dc() -> Any:
    """That of Sana."""
    return diffusers.AutoencoderDC(
        latent_channels=LATENTS, attention_head_dim=4,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        encoder_out_shortcut=False, decoder_in_shortcut=False,
    )  # fmt: skip


def ltx() -> Any:
    """That of LTX-Video: eight times smaller, half of the frames."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=4 * LATENTS, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2, layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False), decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3, downsample_type=("conv",) * 2, upsample_residual=(False,) * 2,
        upsample_factor=(1, 1), patch_size=4, patch_size_t=1,
    )  # fmt: skip


def hunyuan_video() -> Any:
    """That of HunyuanVideo: eight times smaller, a quarter of the frames; its levels are fixed by the class."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=LATENTS, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip


def hunyuan_video15(latents: int) -> Any:
    """That of HunyuanVideo 1.5: sixteen times smaller."""
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=latents, block_out_channels=(32,) * 5, layers_per_block=1
    )


def cogvideox() -> Any:
    """That of CogVideoX: eight times smaller."""
    return diffusers.AutoencoderKLCogVideoX(
        latent_channels=LATENTS, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2,
        sample_height=64, sample_width=64,
    )  # fmt: skip


def cosmos() -> Any:
    """That of Cosmos: eight times smaller, an eighth of the frames."""
    return diffusers.AutoencoderKLCosmos(
        latent_channels=LATENTS, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
        attention_resolutions=(), resolution=64, num_layers=1, latents_mean=None, latents_std=None,
    )  # fmt: skip


def mochi() -> Any:
    """That of Mochi: eight times smaller, a sixth of the frames."""
    return diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, latent_channels=LATENTS,
        layers_per_block=(1,) * 5, latents_mean=None, latents_std=None,
    )  # fmt: skip


def allegro() -> Any:
    """That of Allegro: eight times smaller, a quarter of the frames."""
    return diffusers.AutoencoderKLAllegro(
        latent_channels=LATENTS,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=64,
    )


def oobleck(channels: int) -> Any:
    """That of Stable Audio: sixteen samples a latent."""
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=4, downsampling_ratios=[4, 4], channel_multiples=[1, 1], decoder_channels=4,
        decoder_input_channels=channels, sampling_rate=64,
    )  # fmt: skip


def ltx2() -> Any:
    """That of LTX-2: eight times smaller, half of the frames."""
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=4 * LATENTS, block_out_channels=(8,), decoder_block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",), layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False,) * 2,
        downsample_type=("spatiotemporal",), upsample_type=("spatiotemporal",), upsample_residual=(False,),
        upsample_factor=(1,), patch_size=4,
    )  # fmt: skip


def ltx2_sound() -> Any:
    """That of LTX-2's sound: a quarter of the 32 bands of a spectrum, and of its frames."""
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=64,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        latent_channels=8,
        mel_bins=32,
        resolution=32,
    )


def hunyuan_image() -> Any:
    """That of HunyuanImage: two times smaller here."""
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=LATENTS, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=16, scaling_factor=0.75,
    )  # fmt: skip

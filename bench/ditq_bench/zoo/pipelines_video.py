"""Tiny pipelines that draw videos and sound from a text."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from ditq_bench.zoo import autoencoders, encoders
from ditq_bench.zoo.audio import AUDIO
from ditq_bench.zoo.pipe import Pipe, calls, model, picture
from ditq_bench.zoo.pipelines_image import flow
from ditq_bench.zoo.tiny import LATENTS, WIDTH
from ditq_bench.zoo.video import VIDEO
from ditq_bench.zoo.video_conditioned import VIDEO_CONDITIONED

ENTRY = {tiny.name: tiny for tiny in (*VIDEO, *VIDEO_CONDITIONED, *AUDIO)}
PLAIN = {"template": "{}", "crop_start": 0}  # HunyuanVideo's own template is 95 tokens longer


def _text_to_video(
    kind: type, entry: str, vae: Any, text: tuple[Any, Any] | None = None, **parts: Any
) -> Any:
    """A pipeline with one text encoder, a T5 unless given, and the scheduler of rectified flows."""
    tokenizer, encoder = text or encoders.t5()
    parts = {"scheduler": flow(), "transformer": model(ENTRY[entry]), **parts}
    return kind(tokenizer=tokenizer, text_encoder=encoder, vae=vae, **parts)


def _wan(kind: type = diffusers.WanPipeline, **parts: Any) -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    parts = {"scheduler": scheduler, **parts}
    return _text_to_video(
        kind, "WanTransformer3DModel", autoencoders.wan(), encoders.t5("UMT5"), **parts
    )


def _wan22(kind: type = diffusers.WanPipeline, **changes: Any) -> Any:
    """Two transformers: one for the first of two steps, one for the second."""
    transformers = {
        name: model(ENTRY["WanTransformer3DModel"], seed=seed, **changes)
        for seed, name in enumerate(("transformer", "transformer_2"))
    }
    return _wan(kind, **transformers, boundary_ratio=0.9)


def _wan_given_frame() -> Any:
    """The latents come with those of the first frame and a mask of four channels."""
    return _wan22(diffusers.WanImageToVideoPipeline, in_channels=2 * LATENTS + 4)


def _hunyuan_video() -> Any:
    tokenizer_2, encoder_2 = encoders.clip()
    return _text_to_video(
        diffusers.HunyuanVideoPipeline, "HunyuanVideoTransformer3DModel", autoencoders.hunyuan_video(),
        encoders.llama(), text_encoder_2=encoder_2, tokenizer_2=tokenizer_2,
    )  # fmt: skip


def _hunyuan_video15() -> Any:
    tokenizer_2, encoder_2 = encoders.byt5()
    return _text_to_video(
        diffusers.HunyuanVideo15Pipeline, "HunyuanVideo15Transformer3DModel", autoencoders.hunyuan_video15(LATENTS),
        encoders.qwen25_text(), text_encoder_2=encoder_2, tokenizer_2=tokenizer_2,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip


def _ltx2() -> Any:
    """Video and sound, each with connectors of its own between the text and the transformer."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 32, "num_learnable_registers": 8}
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=3,
        **{f"{stream}_connector_{name}": value for stream in ("video", "audio") for name, value in heads.items()},
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=WIDTH, hidden_channels=WIDTH, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1]], output_sampling_rate=400,
    )  # fmt: skip
    return _text_to_video(
        diffusers.LTX2Pipeline, "LTX2VideoTransformer3DModel", autoencoders.ltx2(), encoders.gemma3(),
        scheduler=flow(use_dynamic_shifting=True), audio_vae=autoencoders.ltx2_sound(), connectors=connectors,
        vocoder=vocoder,
    )  # fmt: skip


def _kandinsky5() -> Any:
    tokenizer_2, encoder_2 = encoders.clip()
    return _text_to_video(
        diffusers.Kandinsky5T2VPipeline, "Kandinsky5Transformer3DModel", autoencoders.hunyuan_video(),
        encoders.qwen25(), text_encoder_2=encoder_2, tokenizer_2=tokenizer_2,
    )  # fmt: skip


def _allegro() -> Any:
    vae, scheduler = autoencoders.allegro(), diffusers.EulerAncestralDiscreteScheduler()
    kind, entry = diffusers.AllegroPipeline, "AllegroTransformer3DModel"
    return _text_to_video(kind, entry, vae, scheduler=scheduler)


def _latte() -> Any:
    vae = autoencoders.image(shift_factor=None)
    transformer = model(ENTRY["LatteTransformer3DModel"], out_channels=2 * LATENTS)
    parts = {"transformer": transformer, "scheduler": diffusers.DDIMScheduler()}
    return _text_to_video(diffusers.LattePipeline, "LatteTransformer3DModel", vae, **parts)


class _Trusting(diffusers.ModelMixin, diffusers.ConfigMixin):
    """In place of Cosmos' guardrail, which is a large model of its own."""

    config_name = "config.json"

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))  # tells a device

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _cosmos() -> Any:
    return _text_to_video(
        diffusers.CosmosTextToWorldPipeline, "CosmosTransformer3DModel", autoencoders.cosmos(),
        scheduler=diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min"), safety_checker=_Trusting(),
    )  # fmt: skip


def _stable_audio() -> Any:
    projection = diffusers.StableAudioProjectionModel(WIDTH, WIDTH, min_value=0, max_value=8)
    return _text_to_video(
        diffusers.StableAudioPipeline, "StableAudioDiTModel", autoencoders.oobleck(WIDTH),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(), projection_model=projection,
    )  # fmt: skip


def _videos(frames: int, side: int, **more: Any) -> tuple[dict[str, Any], ...]:
    return calls(**{"num_frames": frames, "height": side, "width": side, **more})


def _embedded(plain: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """The same calls with embeddings in place of prompts, which some pipelines clean with a package of their own."""
    made = []
    for seed, call in enumerate(plain):
        texts = torch.randn(2, 1, 16, WIDTH, generator=torch.Generator().manual_seed(seed))
        embeddings = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
        made.append({**call, "prompt": None, **embeddings})
    return tuple(made)


_TWO = ("transformer", "transformer_2")
_NO_BINS = {"use_resolution_binning": False}
_NO_SIZE = {"height": None, "width": None, "max_sequence_length": None}
PIPELINES_VIDEO: dict[str, Pipe] = {
    "Wan": Pipe(_wan, _videos(5, 32)),
    "Wan22": Pipe(_wan22, _videos(5, 32, guidance_scale_2=2.0), _TWO),
    "Wan22ImageToVideo": Pipe(_wan_given_frame, _embedded(_videos(5, 32, image=picture(32))), _TWO),
    "SkyReelsV2": Pipe(
        lambda: _text_to_video(
            diffusers.SkyReelsV2Pipeline, "SkyReelsV2Transformer3DModel", autoencoders.wan(), encoders.t5("UMT5"),
            scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        ),
        _embedded(_videos(5, 32)),
    ),
    "LTX": Pipe(
        lambda: _text_to_video(
            diffusers.LTXPipeline, "LTXVideoTransformer3DModel", autoencoders.ltx(),
            scheduler=flow(use_dynamic_shifting=True),
        ),
        _videos(3, 32),
    ),
    "LTX2": Pipe(
        _ltx2,
        _videos(
            3, 32, stg_scale=0.0, audio_stg_scale=0.0, modality_scale=1.0, audio_modality_scale=1.0,
            spatio_temporal_guidance_blocks=[],
        ),
    ),
    "HunyuanVideo": Pipe(_hunyuan_video, _videos(5, 32, prompt_template=PLAIN)),
    "HunyuanVideo15": Pipe(_hunyuan_video15, _videos(5, 64, max_sequence_length=None)),
    "CogVideoX": Pipe(
        lambda: _text_to_video(
            diffusers.CogVideoXPipeline, "CogVideoXTransformer3DModel", autoencoders.cogvideox(),
            scheduler=diffusers.CogVideoXDDIMScheduler(),
        ),
        _videos(5, 32),
    ),
    "Cosmos": Pipe(_cosmos, _videos(9, 32, negative_prompt="bad"), saved=False),
    "Mochi": Pipe(
        lambda: _text_to_video(diffusers.MochiPipeline, "MochiTransformer3DModel", autoencoders.mochi()),
        _videos(7, 32),
    ),
    "Allegro": Pipe(_allegro, _videos(8, 32, clean_caption=False, output_type="latent")),
    "Latte": Pipe(_latte, calls(video_length=2, clean_caption=False, max_sequence_length=None)),
    "SanaVideo": Pipe(
        lambda: _text_to_video(
            diffusers.SanaVideoPipeline, "SanaVideoTransformer3DModel", autoencoders.wan(), encoders.gemma(),
            scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        ),
        calls(frames=5, height=32, width=32, **_NO_BINS, complex_human_instruction=[]),
    ),
    "Kandinsky5": Pipe(_kandinsky5, _videos(5, 32, negative_prompt=" ", max_sequence_length=1024)),
    "StableAudio": Pipe(_stable_audio, calls(audio_end_in_s=4.0, **_NO_SIZE)),
}  # fmt: skip

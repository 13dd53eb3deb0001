"""Tiny pipelines that draw images from a text."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from ditq_bench.zoo import autoencoders, encoders
from ditq_bench.zoo.image import IMAGE
from ditq_bench.zoo.image_packed import IMAGE_PACKED
from ditq_bench.zoo.pipe import Pipe, calls, model
from ditq_bench.zoo.tiny import WIDTH

ENTRY = {tiny.name: tiny for tiny in (*IMAGE, *IMAGE_PACKED)}


def flow(**changes: Any) -> Any:
    """The scheduler of rectified flows."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**changes)


def flux_parts() -> dict[str, Any]:
    """What every pipeline around Flux is made of."""
    tokenizer, encoder = encoders.clip()
    tokenizer_2, encoder_2 = encoders.t5()
    return {
        "scheduler": flow(use_dynamic_shifting=True),
        "vae": autoencoders.image(),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "text_encoder_2": encoder_2,
        "tokenizer_2": tokenizer_2,
        "transformer": model(ENTRY["FluxTransformer2DModel"]),
    }


def sd3_parts() -> dict[str, Any]:
    """What every pipeline around SD3 is made of; both CLIPs side by side are as wide as the T5."""
    kind = transformers.CLIPTextModelWithProjection
    clips = [encoders.clip(kind, WIDTH // 2) for _ in range(2)]
    tokenizer, encoder = encoders.t5()
    return {
        "transformer": model(ENTRY["SD3Transformer2DModel"]),
        "scheduler": flow(shift=3.0),
        "vae": autoencoders.image(),
        **{"text_encoder": clips[0][1], "tokenizer": clips[0][0]},
        **{"text_encoder_2": clips[1][1], "tokenizer_2": clips[1][0]},
        **{"text_encoder_3": encoder, "tokenizer_3": tokenizer},
    }


def _hidream() -> Any:
    kind = transformers.CLIPTextModelWithProjection
    clips = [encoders.clip(kind, WIDTH // 2) for _ in range(2)]
    tokenizer, encoder = encoders.t5()
    tokenizer_4, encoder_4 = encoders.llama(transformers.LlamaForCausalLM)
    pipe = diffusers.HiDreamImagePipeline(
        flow(), autoencoders.image(), clips[0][1], clips[0][0], clips[1][1], clips[1][0], encoder, tokenizer,
        encoder_4, tokenizer_4, model(ENTRY["HiDreamImageTransformer2DModel"]),
    )  # fmt: skip
    pipe.default_sample_size = 8  # it makes images as large as this whatever is asked for
    return pipe


def _one_text(kind: type, entry: str, text: tuple[Any, Any], **parts: Any) -> Any:
    """A pipeline with one text encoder; the scheduler and the autoencoder are those of SD3 unless given."""
    plain = {"scheduler": flow(), "vae": autoencoders.image(), "transformer": model(ENTRY[entry])}
    return kind(tokenizer=text[0], text_encoder=text[1], **{**plain, **parts})


def _pixart(kind: type) -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return _one_text(kind, "PixArtTransformer2DModel", encoders.t5(), scheduler=scheduler)


def _dit() -> Any:
    """A VAE of DiT has no shift; labels instead of prompts."""
    vae = autoencoders.image(shift_factor=None)
    labels = {str(label): f"class {label}" for label in range(1000)}
    transformer = model(ENTRY["DiTTransformer2DModel"])
    return diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(), labels)


def _flux2_klein() -> Any:
    """Its text is what three layers of the encoder say, side by side; distilled guidance it has none."""
    transformer = model(
        ENTRY["Flux2Transformer2DModel"], joint_attention_dim=3 * WIDTH, guidance_embeds=False
    )
    return _one_text(
        diffusers.Flux2KleinPipeline, "Flux2Transformer2DModel", encoders.qwen3(transformers.Qwen3ForCausalLM),
        transformer=transformer, vae=autoencoders.flux2(),
    )  # fmt: skip


def _sana() -> Any:
    return _one_text(
        diffusers.SanaPipeline, "SanaTransformer2DModel", encoders.gemma(), vae=autoencoders.dc(),
        scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )  # fmt: skip


def _cogview3() -> Any:
    scheduler = diffusers.CogVideoXDDIMScheduler()
    entry = "CogView3PlusTransformer2DModel"
    return _one_text(diffusers.CogView3PlusPipeline, entry, encoders.t5(), scheduler=scheduler)


def _krea2() -> Any:
    """Its text is three layers of the encoder, which the transformer fuses itself."""
    return _one_text(
        diffusers.Krea2Pipeline, "Krea2Transformer2DModel", encoders.qwen3_vl(), vae=autoencoders.qwen_image(),
        scheduler=flow(use_dynamic_shifting=True), text_encoder_select_layers=(0, 1, 2),
    )  # fmt: skip


def _hunyuan_image() -> Any:
    """Distilled, with a second text for what is to be written in quotes."""
    tokenizer_2, encoder_2 = encoders.byt5()
    return _one_text(
        diffusers.HunyuanImagePipeline, "HunyuanImageTransformer2DModel", encoders.qwen25(),
        vae=autoencoders.hunyuan_image(), tokenizer_2=tokenizer_2, text_encoder_2=encoder_2,
    )  # fmt: skip


def _longcat() -> Any:
    """The processor, which would rewrite prompts, is its tokenizer here: the calls ask for no rewriting."""
    text = encoders.qwen25()
    scheduler = flow(use_dynamic_shifting=True)
    return _one_text(
        diffusers.LongCatImagePipeline, "LongCatImageTransformer2DModel", text, text_processor=text[0],
        scheduler=scheduler,
    )  # fmt: skip


_NO_BINS = {"use_resolution_binning": False}  # they begin at 256 pixels
_PIXART = {**_NO_BINS, "clean_caption": False}
_DIT = tuple({"class_labels": [label], "num_inference_steps": 2} for label in (1, 207))
PIPELINES_IMAGE: dict[str, Pipe] = {
    "DiT": Pipe(_dit, _DIT),
    "PixArtAlpha": Pipe(lambda: _pixart(diffusers.PixArtAlphaPipeline), calls(**_PIXART)),
    "PixArtSigma": Pipe(lambda: _pixart(diffusers.PixArtSigmaPipeline), calls(**_PIXART)),
    "SD3": Pipe(lambda: diffusers.StableDiffusion3Pipeline(**sd3_parts()), calls()),
    "Flux": Pipe(lambda: diffusers.FluxPipeline(**flux_parts()), calls()),
    "Flux2Klein": Pipe(_flux2_klein, calls(text_encoder_out_layers=(0, 1, 2))),
    "Chroma": Pipe(
        lambda: _one_text(
            diffusers.ChromaPipeline, "ChromaTransformer2DModel", encoders.t5()
        ),
        calls(),
    ),
    "QwenImage": Pipe(
        lambda: _one_text(
            diffusers.QwenImagePipeline, "QwenImageTransformer2DModel", encoders.qwen25(),
            vae=autoencoders.qwen_image(), scheduler=flow(use_dynamic_shifting=True),
        ),
        calls(negative_prompt=" ", max_sequence_length=512),
    ),
    "ZImage": Pipe(
        lambda: _one_text(
            diffusers.ZImagePipeline, "ZImageTransformer2DModel", encoders.qwen3()
        ),
        calls(max_sequence_length=64),
    ),
    "AuraFlow": Pipe(
        lambda: _one_text(
            diffusers.AuraFlowPipeline, "AuraFlowTransformer2DModel", encoders.t5("UMT5")
        ),
        calls(),
    ),
    "Sana": Pipe(_sana, calls(height=32, width=32, **_NO_BINS, complex_human_instruction=[])),
    "HiDream": Pipe(_hidream, calls(), saved=False),
    "Lumina2": Pipe(
        lambda: _one_text(
            diffusers.Lumina2Pipeline, "Lumina2Transformer2DModel", encoders.gemma()
        ),
        calls(height=64, width=64, system_prompt="draw", max_sequence_length=64),
    ),
    "LuminaNext": Pipe(
        lambda: _one_text(diffusers.LuminaPipeline, "LuminaNextDiT2DModel", encoders.gemma("Gemma")),
        calls(height=64, width=64, clean_caption=False),
    ),
    "CogView3Plus": Pipe(_cogview3, calls(max_sequence_length=224)),
    "CogView4": Pipe(
        lambda: _one_text(diffusers.CogView4Pipeline, "CogView4Transformer2DModel", encoders.glm()),
        calls(negative_prompt=" "),
    ),
    "Bria": Pipe(
        lambda: _one_text(diffusers.BriaPipeline, "BriaTransformer2DModel", encoders.t5()), calls()
    ),
    "OvisImage": Pipe(
        lambda: _one_text(
            diffusers.OvisImagePipeline, "OvisImageTransformer2DModel", encoders.qwen3(),
            scheduler=flow(use_dynamic_shifting=True),
        ),
        calls(max_sequence_length=256),
    ),
    "Krea2": Pipe(_krea2, calls(max_sequence_length=256)),
    "HunyuanImage": Pipe(_hunyuan_image, calls(max_sequence_length=None)),
    "LongCatImage": Pipe(_longcat, calls(max_sequence_length=None, enable_prompt_rewrite=False)),
}  # fmt: skip

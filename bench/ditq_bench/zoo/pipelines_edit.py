"""Tiny pipelines that draw from more than a text: an image to vary, one to edit, one that a ControlNet follows."""

from __future__ import annotations

from typing import Any

import diffusers

from ditq_bench.zoo.pipe import PIXELS, Pipe, calls, picture
from ditq_bench.zoo.pipelines_image import ENTRY, PIPELINES_IMAGE, flux_parts, sd3_parts
from ditq_bench.zoo.tiny import redraw


def _flux_controlnet() -> Any:
    """A ControlNet of one block of either kind: diffusers repeats what it says for the transformer's two."""
    config = {**ENTRY["FluxTransformer2DModel"].config, "num_layers": 1, "num_single_layers": 1}
    controlnet = redraw(diffusers.FluxControlNetModel(**config))
    return diffusers.FluxControlNetPipeline(**flux_parts(), controlnet=controlnet)


def _sd3_controlnet() -> Any:
    config = {**ENTRY["SD3Transformer2DModel"].config, "num_layers": 1}
    controlnet = redraw(diffusers.SD3ControlNetModel(**config))
    return diffusers.StableDiffusion3ControlNetPipeline(**sd3_parts(), controlnet=controlnet)


PIPELINES_EDIT: dict[str, Pipe] = {
    "FluxImg2Img": Pipe(
        lambda: diffusers.FluxImg2ImgPipeline(**flux_parts()),
        calls(image=picture(), strength=0.8, num_inference_steps=3),
    ),
    "SD3Img2Img": Pipe(
        lambda: diffusers.StableDiffusion3Img2ImgPipeline(**sd3_parts()),
        calls(image=picture(), strength=0.8, num_inference_steps=3),
    ),
    "FluxKontext": Pipe(
        lambda: diffusers.FluxKontextPipeline(**flux_parts()),
        calls(image=picture(), max_area=PIXELS**2, _auto_resize=False),
    ),
    "Flux2KleinEdit": Pipe(
        PIPELINES_IMAGE["Flux2Klein"].make,
        calls(image=picture(64), text_encoder_out_layers=(0, 1, 2)),
    ),
    "FluxControlNet": Pipe(
        _flux_controlnet, calls(control_image=picture(), controlnet_conditioning_scale=0.7)
    ),
    "SD3ControlNet": Pipe(
        _sd3_controlnet, calls(control_image=picture(), controlnet_conditioning_scale=0.7)
    ),
}

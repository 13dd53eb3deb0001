"""A zoo of tiny models: the diffusion transformers of diffusers 0.42 with random parameters, built offline.

    CLASSES["FluxTransformer2DModel"]
        .build()        the model: two blocks per list, widths that are multiples of 64
        .inputs(model)  arguments of one forward, as the class's pipeline passes them
        .timestep       the argument that carries the timestep
        .pipeline()     a whole pipeline around it, if there is one, and two calls of it in .calls
    PIPELINES["FluxControlNet"]
        .build()        a pipeline with tiny encoders and autoencoder: of a class above, or of another task for it
        .calls          keyword arguments of two calls: two steps, the smallest size
    LEFT_OUT        what stands beside them in diffusers.models.transformers, and why it is not here

`python -m ditq_bench.zoo` builds and checks all of it and prints a table. Configurations stand in tables by what the
classes draw: image, image_packed, video, video_conditioned, audio, other; pipelines in pipelines_image, pipelines_video
and pipelines_edit. Needs what the tests need (transformers).
"""

from __future__ import annotations

from dataclasses import replace

from ditq_bench.zoo.audio import AUDIO
from ditq_bench.zoo.image import IMAGE
from ditq_bench.zoo.image_packed import IMAGE_PACKED
from ditq_bench.zoo.other import OTHER
from ditq_bench.zoo.pipe import Pipe
from ditq_bench.zoo.pipelines import MAIN, PIPELINES
from ditq_bench.zoo.tiny import Draw, Tiny, outputs, quiet, redraw
from ditq_bench.zoo.video import VIDEO
from ditq_bench.zoo.video_conditioned import VIDEO_CONDITIONED

CLASSES: dict[str, Tiny] = {
    tiny.name: tiny for tiny in (*IMAGE, *IMAGE_PACKED, *VIDEO, *VIDEO_CONDITIONED, *AUDIO, *OTHER)
}
for _name, _pipe in MAIN.items():
    CLASSES[_name] = replace(
        CLASSES[_name], pipeline=PIPELINES[_pipe].build, calls=PIPELINES[_pipe].calls
    )
LEFT_OUT: dict[str, str] = {
    "DreamLiteTransformer2DModel": "a part of a U-Net: takes no timestep",
    "DualTransformer2DModel": "a part of a U-Net: two Transformer2DModel side by side",
    "MiniMaxMusic3RVQDepthDecoder": "a language model over audio codes: denoises nothing",
    "PriorTransformer": "predicts an image embedding for unCLIP: one vector, no latents",
    "Transformer2DModel": "a part of U-Nets; as a denoiser only the old name of DiT and PixArt",
    "TransformerTemporalModel": "a part of a video U-Net: takes no timestep",
}

__all__ = [
    "CLASSES", "LEFT_OUT", "PIPELINES", "Draw", "Pipe", "Tiny", "outputs", "quiet", "redraw",
]  # fmt: skip

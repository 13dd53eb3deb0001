"""All tiny pipelines by name, and which of them stands for a class."""

from __future__ import annotations

from ditq_bench.zoo.pipe import Pipe
from ditq_bench.zoo.pipelines_edit import PIPELINES_EDIT
from ditq_bench.zoo.pipelines_image import PIPELINES_IMAGE
from ditq_bench.zoo.pipelines_video import PIPELINES_VIDEO

PIPELINES: dict[str, Pipe] = {**PIPELINES_IMAGE, **PIPELINES_VIDEO, **PIPELINES_EDIT}
MAIN = {  # class -> pipeline
    "AllegroTransformer3DModel": "Allegro",
    "AuraFlowTransformer2DModel": "AuraFlow",
    "BriaTransformer2DModel": "Bria",
    "ChromaTransformer2DModel": "Chroma",
    "CogVideoXTransformer3DModel": "CogVideoX",
    "CogView3PlusTransformer2DModel": "CogView3Plus",
    "CogView4Transformer2DModel": "CogView4",
    "CosmosTransformer3DModel": "Cosmos",
    "DiTTransformer2DModel": "DiT",
    "Flux2Transformer2DModel": "Flux2Klein",
    "FluxTransformer2DModel": "Flux",
    "HiDreamImageTransformer2DModel": "HiDream",
    "HunyuanImageTransformer2DModel": "HunyuanImage",
    "HunyuanVideo15Transformer3DModel": "HunyuanVideo15",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "Kandinsky5Transformer3DModel": "Kandinsky5",
    "Krea2Transformer2DModel": "Krea2",
    "LTX2VideoTransformer3DModel": "LTX2",
    "LTXVideoTransformer3DModel": "LTX",
    "LatteTransformer3DModel": "Latte",
    "LongCatImageTransformer2DModel": "LongCatImage",
    "Lumina2Transformer2DModel": "Lumina2",
    "LuminaNextDiT2DModel": "LuminaNext",
    "MochiTransformer3DModel": "Mochi",
    "OvisImageTransformer2DModel": "OvisImage",
    "PixArtTransformer2DModel": "PixArtSigma",
    "QwenImageTransformer2DModel": "QwenImage",
    "SD3Transformer2DModel": "SD3",
    "SanaTransformer2DModel": "Sana",
    "SanaVideoTransformer3DModel": "SanaVideo",
    "SkyReelsV2Transformer3DModel": "SkyReelsV2",
    "StableAudioDiTModel": "StableAudio",
    "WanTransformer3DModel": "Wan22",
    "ZImageTransformer2DModel": "ZImage",
}

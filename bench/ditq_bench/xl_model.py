"""A DiT-XL/2-shaped float pipeline with random weights: real in size, shape and files, meaningless in its images.

Written block by block from seeds, so that building it needs no more memory than one block.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

from ditq_converters.streaming.write import write_shards
from ditq_runtime.calls.seeds import generator
from ditq_runtime.files import atomic_folder

DIT_XL_2: dict[str, Any] = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_num_groups": 32,
}  # fmt: skip
SD_VAE: dict[str, Any] = {  # sd-vae-ft-ema, which DiT-XL/2 decodes with
    "block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 256, "scaling_factor": 0.18215,
}  # fmt: skip
INDEX = {
    "_class_name": "DiTPipeline",
    "_diffusers_version": diffusers.__version__,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "transformer": ["diffusers", "DiTTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SHARD = "1GB"
SPREAD = 0.5  # of a weight, times 1 / sqrt(inputs): 28 random blocks stay in a sane range


def build(
    folder: Path, config: dict[str, Any] | None = None, vae: dict[str, Any] | None = None
) -> None:
    """Write the pipeline folder, atomically; the embedders of all blocks are equal, as a trained DiT's are.

    Args:
        folder: to write; must not exist.
        config: of the transformer; default: DIT_XL_2.
        vae: of the decoder; default: SD_VAE.
    """
    with init_empty_weights():
        model: Any = DiTTransformer2DModel(**(config or DIT_XL_2))
    tensors = model.state_dict()

    def read(name: str) -> torch.Tensor:
        return random_tensor(name, tuple(tensors[name].shape))

    with atomic_folder(folder) as part:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoencoderKL(**(vae or SD_VAE)).save_pretrained(part / "vae")
        DDIMScheduler(clip_sample=False).save_pretrained(part / "scheduler")
        model.save_config(part / "transformer")
        write_shards(part / "transformer", tensors, read, SHARD)
        (part / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n", encoding="utf-8")


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A Gaussian tensor that depends on its name and shape alone; of an embedder, on its name inside the block."""
    seed = zlib.crc32(re.sub(r"transformer_blocks\.\d+\.norm1\.emb", "emb", name).encode())
    inputs = shape[1] if len(shape) > 1 else 1024
    values = torch.randn(shape, generator=generator(seed, 0, 0))
    return values * (SPREAD / inputs**0.5)

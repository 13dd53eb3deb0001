"""What is damaged: folders of tiny packed transformers, in one file and in shards."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel

from ditq_converters import Recipe, convert
from ditq_runtime.format.folder import open_folder
from ditq_runtime.host import skeleton

FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"


@dataclass(frozen=True)
class Target:
    """A packed folder that is whole.

    Attributes:
        folder: of the transformer.
        files: name -> content of everything in it.
        config: its parsed config.json.
        headers: tensor -> dtype and shape.
        model: its class and scheme on meta.
        state: its tensors.
    """

    folder: Path
    files: dict[str, bytes]
    config: dict[str, Any]
    headers: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    model: Any
    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, folder: Path) -> Target:
        """Read a folder."""
        opened = open_folder(folder)
        assert opened.scheme is not None
        config = {k: v for k, v in opened.config.items() if k != "quantization_config"}
        with init_empty_weights():
            model = DiTTransformer2DModel.from_config(config)
        skeleton.install(model, opened.scheme, torch.float32)
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        headers = {name: (info.dtype, info.shape) for name, info in opened.headers.items()}
        loaded = DiTTransformer2DModel.from_pretrained(folder).state_dict()
        state = {name: tensor.clone() for name, tensor in loaded.items()}  # the file changes
        return cls(folder, files, opened.config, headers, model, state)

    def restore(self) -> None:
        """Make the folder whole again."""
        for path in self.folder.iterdir():
            if path.name not in self.files:
                path.unlink()
        for name, content in self.files.items():
            path = self.folder / name
            if path.is_dir():
                path.rmdir()
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)

    def header(self, name: str = FILE) -> tuple[bytes, int]:
        """The header of a file with its length in front, and the number of bytes behind it."""
        raw = self.files[name]
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        return raw[:end], len(raw) - end


def targets(folder: Path) -> tuple[Target, Target]:
    """One transformer, in one file and in shards: w8 and w4p, static scales, a low-rank branch, sites that smooth."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=1, num_layers=1, sample_size=8,
            patch_size=2, num_embeds_ada_norm=3,
        ).eval()  # fmt: skip
    recipe = Recipe("linear", "w4p", group_size=32, keep=("*.to_q",))
    convert(model, recipe, out=folder / "one", quiet=True)
    convert(model, recipe, out=folder / "shards", max_shard_size="20KB", quiet=True)
    for name in ("one", "shards"):
        plan = folder / name / "ditq"
        for file in plan.iterdir():
            file.unlink()
        plan.rmdir()
    return Target.of(folder / "one"), Target.of(folder / "shards")


def index_of(target: Target) -> Any:
    """The parsed index of its shards."""
    return json.loads(target.files[INDEX])

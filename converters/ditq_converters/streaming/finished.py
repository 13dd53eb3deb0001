"""Converted blocks of an unfinished conversion, kept beside its output, so that a killed one goes on.

.OUT.blocks/TRANSFORMER/conversion.json     what is being made: of other settings, the folder is emptied
.OUT.blocks/TRANSFORMER/convert.log         times and ETA
.OUT.blocks/TRANSFORMER/BLOCK.safetensors   stored tensors of one block, and its formats as metadata; by atomic rename
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ditq_runtime.files import atomic_file, write_json
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.safetensors_header import read_header

SETTINGS = "conversion.json"


@dataclass(frozen=True)
class FinishedBlocks:
    """The blocks that are done.

    Attributes:
        folder: where they are.
    """

    folder: Path

    @classmethod
    def open(cls, out: Path, component: str, settings: dict[str, Any]) -> FinishedBlocks:
        """Blocks of an earlier run for `out` if it had the same settings; an empty folder if not."""
        folder = folder_of(out) / component
        settings = json.loads(json.dumps(settings))
        if not _holds(folder, settings):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / SETTINGS, settings)
        return cls(folder)

    def names(self) -> set[str]:
        """Names of the blocks that are done."""
        return {path.stem for path in self.folder.glob("*.safetensors")}

    def save(
        self, block: str, tensors: dict[str, torch.Tensor], formats: dict[str, LayerFormat]
    ) -> None:
        """Keep a block: full tensor name -> tensor, full layer name -> format."""
        listed = json.dumps({name: asdict(layer_format) for name, layer_format in formats.items()})
        with atomic_file(self.folder / f"{block}.safetensors") as part:
            save_file(tensors, part, metadata={"formats": listed})

    def load(self, block: str) -> dict[str, torch.Tensor]:
        """Full tensor name -> tensor of a block."""
        return load_file(self.folder / f"{block}.safetensors")

    def formats(self, blocks: list[str]) -> dict[str, LayerFormat]:
        """Full layer name -> format of all blocks, in order."""
        formats: dict[str, LayerFormat] = {}
        for block in blocks:
            with safe_open(self.folder / f"{block}.safetensors", "pt") as file:
                listed = json.loads(file.metadata()["formats"])
            formats.update({name: LayerFormat(**fields) for name, fields in listed.items()})
        return formats

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full tensor name -> shape."""
        headers = [read_header(path) for path in self.folder.glob("*.safetensors")]
        return {name: info.shape for header in headers for name, info in header.items()}

    def files(self) -> dict[str, Path]:
        """Full tensor name -> the file that holds it."""
        return {
            name: path for path in self.folder.glob("*.safetensors") for name in read_header(path)
        }


def folder_of(out: Path) -> Path:
    """Where the blocks of an unfinished conversion into `out` are kept."""
    return out.with_name(f".{out.name}.blocks")


def forget(out: Path) -> None:
    """Remove them."""
    shutil.rmtree(folder_of(out), ignore_errors=True)


def _holds(folder: Path, settings: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / SETTINGS).read_text(encoding="utf-8")) == settings)
    except (OSError, ValueError):  # none there, or cut off
        return False

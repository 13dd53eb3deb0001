"""The demo's asset files: safetensors with text metadata, written whole or not at all."""

from __future__ import annotations

import json
import struct
from importlib import resources
from pathlib import Path

import torch

from ditq_runtime.files import atomic_file

DIGITS_FILE = "digits.safetensors"
FLOW_FILE = "digits-flow.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"


def _sort_metadata(data: bytes) -> bytes:
    """Sort the metadata of a safetensors file: the library writes it in random order."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def save_asset(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata as one safetensors file, atomically; equal input, equal bytes."""
    from safetensors.torch import save

    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    with atomic_file(path) as part:
        part.write_bytes(_sort_metadata(save(contiguous, metadata=metadata)))


def load_asset(file: str, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """Read an asset's tensors on the CPU, as stored.

    Args:
        file: one of the names above.
        folder: where to look; by default the assets that are installed with this package.
    """
    from safetensors.torch import load

    root = folder or resources.files("ditq_converters.demo") / "assets"
    return load((root / file).read_bytes())

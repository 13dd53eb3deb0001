"""The float weights of a transformer folder, read a few tensors at a time. Never a pickle."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ditq_runtime.format.checkpoint import read_headers
from ditq_runtime.format.safetensors_header import TensorInfo, read_header

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class FloatSource:
    """Where the tensors of a float transformer are.

    Attributes:
        folder: with config.json and the weights.
        config: parsed config.json.
        headers: tensor name -> dtype, shape, bytes.
        files: tensor name -> its file.
        dtype: that floating tensors are read in.
    """

    folder: Path
    config: dict[str, Any]
    headers: dict[str, TensorInfo]
    files: dict[str, Path]
    dtype: torch.dtype

    @classmethod
    def open(cls, folder: Path, dtype: torch.dtype = torch.float32) -> FloatSource:
        """Read config and headers.

        Raises:
            ValueError: no weights in safetensors; names a pickle that is there instead.
            CheckpointError: a shard is missing or damaged.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        paths = _weight_files(folder)
        headers = read_headers(paths)
        return cls(
            folder, config, headers, {n: path for path in paths for n in read_header(path)}, dtype
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, read."""
        return sum(self.size(name) for name in self.headers)

    def size(self, name: str) -> int:
        """Bytes of one tensor, read."""
        tensor = self.empty(name)
        return tensor.numel() * tensor.itemsize

    def empty(self, name: str) -> torch.Tensor:
        """A tensor on meta, of the shape and dtype that reading gives."""
        info = self.headers[name]
        dtype = self.dtype if info.dtype.is_floating_point else info.dtype
        return torch.empty(info.shape, dtype=dtype, device="meta")

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Name -> tensor on the CPU. Files are mapped, and unmapped when their tensors are gone."""
        tensors: dict[str, torch.Tensor] = {}
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.files[name], []).append(name)
        for path, inside in wanted.items():
            with safe_open(path, "pt") as file:  # open only as long: it keeps pages in memory
                for name in inside:
                    tensor = file.get_tensor(name)
                    tensors[name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return tensors

    def check(self, model: nn.Module) -> None:
        """Compare names and shapes with those that config.json asks for.

        Raises:
            ValueError: names the first tensor that is missing or of another shape.
        """
        expected = model.state_dict()
        for name in expected:
            if name not in self.headers:
                raise ValueError(f"{self.folder}: {name} is missing{self._instead(name, expected)}")
            if self.headers[name].shape != tuple(expected[name].shape):
                raise ValueError(
                    f"{self.folder}: {name} has shape {list(self.headers[name].shape)}, config.json asks for "
                    f"{list(expected[name].shape)}; one of them belongs to another model"
                )

    def _instead(self, name: str, expected: dict[str, torch.Tensor]) -> str:
        unknown = [other for other in self.headers if other not in expected]
        close = difflib.get_close_matches(name, unknown, n=1, cutoff=0.6)
        if close:
            return (
                f", but {close[0]} is there: was it renamed? Rename it back or save the model again"
            )
        return " from its weights, though config.json asks for it; copy or download it again"


def _weight_files(folder: Path) -> list[Path]:
    """The files that diffusers would load, in its order: one, or the shards of an index."""
    single, index = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
    if single.exists():
        return [single]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if not (folder / name).exists():
                raise ValueError(
                    f"{folder / name}: missing, though {index.name} names it; copy it again"
                )
        return [folder / name for name in names]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]}: is a pickle, which ditq does not open piece by piece (nor trusts); "
            "load it with diffusers once and save it again with save_pretrained, as safetensors"
        )
    raise ValueError(f"{folder}: no {WEIGHTS} there; the model is incomplete")

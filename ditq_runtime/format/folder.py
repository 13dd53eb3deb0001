"""Look into a packed folder without loading it: where its files are and what they hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.checkpoint import check_version, read_headers
from ditq_runtime.format.digests import read_digests
from ditq_runtime.format.safetensors_header import TensorInfo
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.format.version1 import Version1

WEIGHTS = "diffusion_pytorch_model*.safetensors"


@dataclass(frozen=True)
class TransformerFolder:
    """The files of one transformer.

    Attributes:
        path: the folder with its config.json.
        config: parsed config.json.
        files: its safetensors files.
        headers: tensor name -> dtype, shape, bytes.
    """

    path: Path
    config: dict[str, Any]
    files: list[Path]
    headers: dict[str, TensorInfo]

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config`, None for a float model."""
        return self.config.get("quantization_config")

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of a packed transformer, of version 1 without its sites; None for a float model."""
        if self.quantization is None:
            return None
        method = self.quantization.get("quant_method")
        if method != "ditq":
            raise CheckpointError(f"{self.path}: quantized with {method!r}, which is not ditq")
        version, stored = (self.quantization.get(key) for key in ("format_version", "scheme"))
        check_version(version)
        return Version1.read(stored).scheme if version == 1 else Scheme.from_dict(stored)

    @property
    def digests(self) -> dict[str, str]:
        """Tensor name -> its digest; none where the folder holds none."""
        return read_digests((self.quantization or {}).get("digests"))

    @property
    def nbytes(self) -> int:
        """Bytes on disk of its weight files."""
        return sum(file.stat().st_size for file in self.files)


def open_folder(path: str | Path) -> TransformerFolder:
    """Read config and headers of a transformer folder, or of the transformer of a pipeline folder.

    Raises:
        CheckpointError: no such folder, no config, no weights, or a damaged file; names it.
    """
    folder = Path(path)
    if (folder / "model_index.json").exists():
        folder = folder / "transformer"
    config = folder / "config.json"
    if not config.exists():
        raise CheckpointError(
            f"{path}: no config.json there; expected a diffusers pipeline or transformer folder"
        )
    try:
        parsed = json.loads(config.read_text())
    except ValueError as error:
        raise CheckpointError(f"{config}: not valid JSON ({error}); copy it again") from error
    _check_object(parsed, f"{config}")
    _check_object(parsed.get("quantization_config") or {}, f"{config}: quantization_config")
    files = sorted(folder.glob(WEIGHTS))
    _check_shards(folder, files)
    if not files:
        raise CheckpointError(f"{folder}: no {WEIGHTS} there; the checkpoint is incomplete")
    return TransformerFolder(folder, parsed, files, read_headers(files))


def _check_object(value: Any, what: str) -> None:
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object, got {value!r}; copy the file again")


def _check_shards(folder: Path, files: list[Path]) -> None:
    """Every shard that an index names must be there."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: damaged ({error}); copy it again") from error
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise CheckpointError(
                f"{folder / missing[0]}: missing, though {index.name} names it; copy it again"
            )

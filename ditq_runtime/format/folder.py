"""Look into a packed folder without loading it: where its files are and what they hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.checkpoint import check_version, read_headers
from ditq_runtime.format.digests import read_digests
from ditq_runtime.format.rules import Rule, check_value, shown
from ditq_runtime.format.safetensors_header import TensorInfo
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.format.version1 import VERSION, Version1

WEIGHT_MAP, RECIPE = Rule(dict, items=str), Rule(dict, nullable=True)
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
        check_value("quantization_config: recipe", self.quantization.get("recipe"), RECIPE)
        if self.version1 is not None:
            return self.version1.scheme
        return Scheme.from_dict(self.quantization.get("scheme"))

    @property
    def version1(self) -> Version1 | None:
        """The scheme of a transformer packed in format version 1; None for any other."""
        version, stored = ((self.quantization or {}).get(k) for k in ("format_version", "scheme"))
        check_version(version)
        return Version1.read(stored) if version == VERSION else None

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
    parsed = read_json(config)
    if parsed.get("quantization_config") is not None:
        _check_object(parsed["quantization_config"], f"{config}: quantization_config")
    files = sorted(folder.glob(WEIGHTS))
    _check_shards(folder, files)
    if not files:
        raise CheckpointError(f"{folder}: no {WEIGHTS} there; the checkpoint is incomplete")
    return TransformerFolder(folder, parsed, files, read_headers(files))


def transformer_folders(path: str | Path) -> dict[str, TransformerFolder]:
    """Every transformer of a pipeline folder by the name of its component; `transformer` where it stands alone.

    Raises:
        CheckpointError: as `open_folder`, for any of them.
    """
    root = Path(path)
    if not (root / "model_index.json").exists():
        return {"transformer": open_folder(root)}
    inside = sorted(folder for folder in root.glob("transformer*") if folder.is_dir())
    return {folder.name: open_folder(folder) for folder in inside or [root / "transformer"]}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError for anything else, named."""
    if not path.is_file():  # a pipe would wait for ever
        raise CheckpointError(f"{path}: is no file; copy it again")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy it again") from error
    _check_object(parsed, f"{path}")
    return cast("dict[str, Any]", parsed)


def _check_object(value: Any, what: str) -> None:
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{what} must be a JSON object, got {shown(value)}; copy the file again"
        )


def _check_shards(folder: Path, files: list[Path]) -> None:
    """Every shard that an index names must be there."""
    for index in folder.glob("*.safetensors.index.json"):
        check_value(f"{index}: weight_map", read_json(index).get("weight_map"), WEIGHT_MAP)
        named = set(read_json(index)["weight_map"].values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise CheckpointError(
                f"{folder / missing[0]}: missing, though {index.name} names it; copy it again"
            )

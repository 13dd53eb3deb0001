"""Look into a packed folder without loading it: where its files are and what they hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.checkpoint import check_stored, check_version, read_headers
from ditq_runtime.format.digests import CONFIG, check_config, read_digests
from ditq_runtime.format.rules import Rule, check_value, shown
from ditq_runtime.format.safetensors_header import TensorInfo, read_header
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.format.version1 import VERSION, Version1

WEIGHT_MAP, RECIPE = Rule(dict, items=str), Rule(dict, nullable=True)
METHODS = ("quant_method", "load_in_4bit", "load_in_8bit")  # by which diffusers knows a method
CODES = (torch.int8, torch.uint8)
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
        found = read_digests((self.quantization or {}).get("digests"))
        return {name: value for name, value in found.items() if name != CONFIG}

    def check_config(self) -> None:
        """Look at everything in config.json that the runtime reads, then compare it with its digest.

        Raises:
            CheckpointError: a value that cannot be, or another digest.
        """
        check_stored(self.quantization or {})
        assert self.scheme is not None
        check_config(self.path / CONFIG, self.config)

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
    is_packed(config, parsed)
    files = sorted(folder.glob(WEIGHTS))
    check_shards(folder, files)
    if not files:
        raise CheckpointError(f"{folder}: no {WEIGHTS} there; the checkpoint is incomplete")
    headers = read_headers(files)
    refuse_codes_as_weights(config, parsed, headers)
    return TransformerFolder(folder, parsed, files, headers)


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


def is_packed(path: Path, config: dict[str, Any]) -> bool:
    """Whether a parsed config.json is that of a packed model; CheckpointError where nobody could tell."""
    found = config.get("quantization_config")
    others = [value for key, value in config.items() if key != "quantization_config"]
    if any(isinstance(value, dict) and value.get("quant_method") == "ditq" for value in others):
        raise CheckpointError(
            f"{path}: its quantization_config has another name; the file is damaged, copy it again"
        )
    if found is not None:
        _check_object(found, f"{path}: quantization_config")
        if not any(key in found for key in METHODS):
            raise CheckpointError(
                f"{path}: quantization_config: quant_method is missing; copy it again"
            )
        _check_names(path, config, found)
    return found is not None and found.get("quant_method") == "ditq"


def _check_names(path: Path, config: dict[str, Any], found: dict[str, Any]) -> None:
    """The method of a quantization and the class of its model, which decide who reads the rest."""
    method, scheme = found.get("quant_method", ""), found.get("scheme")
    architecture = scheme.get("architecture") if isinstance(scheme, dict) else None
    ours = architecture is not None
    if not isinstance(method, str) or (ours and method != "ditq"):
        wanted = "'ditq'" if ours else "a string"
        raise CheckpointError(
            f"{path}: quantization_config: quant_method must be {wanted}, got {shown(method)}; copy it again"
        )
    if not ours or "_class_name" not in config or config["_class_name"] == architecture:
        return
    raise CheckpointError(
        f"{path}: _class_name is {shown(config['_class_name'])}, but its scheme was written for "
        f"{shown(architecture)}; copy it again"
    )


def refuse_codes_as_weights(
    path: Path, config: dict[str, Any], headers: Mapping[str, TensorInfo]
) -> None:
    """Refuse a config.json without quantization beside integer codes, which would be read as float weights."""
    if config.get("quantization_config") is not None:
        return
    for name, info in headers.items():
        if info.dtype in CODES and name.endswith(".weight") and f"{name}_scale" in headers:
            raise CheckpointError(
                f"{path}: quantization_config is missing, though {name} in {info.file.name} is integer codes; copy "
                "config.json again"
            )


def refuse_codes_beside(path: Path, config: dict[str, Any]) -> None:
    """The same for the files beside a config.json; one that nobody can read is for its reader to refuse."""
    for file in sorted(path.parent.glob("*.safetensors")):
        headers: dict[str, TensorInfo] = {}
        with suppress(CheckpointError, OSError):
            headers = read_header(file)
        refuse_codes_as_weights(path, config, headers)


def _check_object(value: Any, what: str) -> None:
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{what} must be a JSON object, got {shown(value)}; copy the file again"
        )


def check_shards(folder: Path, files: list[Path]) -> None:
    """Every shard that an index names must be there."""
    for index in folder.glob("*.safetensors.index.json"):
        found = read_json(index)
        check_value(f"{index}: weight_map", found.get("weight_map"), WEIGHT_MAP)
        check_value(f"{index}: metadata", found.get("metadata"), Rule(dict))
        named = set(found["weight_map"].values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise CheckpointError(
                f"{folder / shown(missing[0])}: missing, though {index.name} names it; copy it again"
            )

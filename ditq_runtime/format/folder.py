"""Look into a packed folder without loading it: where its files are, what they hold, how many bytes of what."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditq_runtime.attention.processor import CORE
from ditq_runtime.errors import CheckpointError
from ditq_runtime.families import family_of
from ditq_runtime.format.checkpoint import check_version, read_headers
from ditq_runtime.format.safetensors_header import TensorInfo
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.lora.folds import FOLDS

WEIGHTS = "diffusion_pytorch_model*.safetensors"
CATEGORY_OF_FIELD = {
    "weight": "block weights",
    "group_scale": "group scales and offsets",
    "group_offset": "group scales and offsets",
    "weight_zero": "group scales and offsets",
    "bias": "biases",
    "weight_scale": "channel and activation scales",
    "weight_sum": "channel and activation scales",
    "act_scale": "channel and activation scales",
    "act_zero": "channel and activation scales",
    "smooth_inv": "channel and activation scales",
    "q_scale": "channel and activation scales",
    "k_scale": "channel and activation scales",
    "v_scale": "channel and activation scales",
    "lora_down": "low-rank branches",
    "lora_up": "low-rank branches",
}
CATEGORIES = (
    "block weights",
    "modulation weights",
    "group scales and offsets",
    "channel and activation scales",
    "biases",
    "low-rank branches",
    "folds",
    "timestep and label embedder",
    "other float",
    "file headers",
)


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
        """The scheme of a packed transformer, None for a float model."""
        if self.quantization is None:
            return None
        method = self.quantization.get("quant_method")
        if method != "ditq":
            raise CheckpointError(f"{self.path}: quantized with {method!r}, which is not ditq")
        check_version(self.quantization.get("format_version"))
        return Scheme.from_dict(self.quantization.get("scheme"))

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


def size_by_category(folder: TransformerFolder) -> dict[str, int]:
    """Bytes on disk by CATEGORIES; they add up to `folder.nbytes`. Layers that `--keep` left float are other float."""
    family, scheme = family_of(str(folder.config.get("_class_name"))), folder.scheme
    sizes = dict.fromkeys(CATEGORIES, 0)
    for name, info in folder.headers.items():
        layer, _, field = name.rpartition(".")
        layer_format = scheme.format_of(layer) if scheme and layer in scheme.layers else None
        if family.shared_embedder and f".{family.shared_embedder}." in name:
            category = "timestep and label embedder"
        elif f".{FOLDS}." in name:
            category = "folds"
        elif scheme and layer.removesuffix(f".{CORE}") in scheme.attention:
            category = CATEGORY_OF_FIELD[field]
        elif layer_format is None or layer_format.weights == "fp32":
            category = "other float"
        elif field == "weight" and not layer_format.integer_gemm:
            category = "modulation weights"
        elif field in ("weight_scale", "weight_sum") and len(info.shape) == 2:  # one a group
            category = "group scales and offsets"
        else:
            category = CATEGORY_OF_FIELD.get(field, "other float")
        sizes[category] += info.nbytes
    sizes["file headers"] = folder.nbytes - sum(sizes.values())
    return sizes

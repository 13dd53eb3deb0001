"""Open a model within a memory budget: load it where it fits, leave its weights on disk where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from ditq_converters.memory import format_bytes, held
from ditq_converters.streaming.model import open_streamed
from ditq_converters.streaming.source import PICKLES, FloatSource
from ditq_runtime.format.safetensors_header import read_header

PIPELINE_FILE, TRANSFORMER = "model_index.json", "transformer"
LOADED = (
    2.0  # float model and packed one, or float model and statistics, and what either needs beside
)


def fits(folder: Path, budget: int) -> bool:
    """Whether all weights below a folder, in fp32, can be loaded and converted within `budget` bytes."""
    numbers = (
        info.nbytes // info.dtype.itemsize
        for path in folder.rglob("*.safetensors")
        for info in read_header(path).values()
    )
    return held(torch.device("cpu")) + LOADED * 4 * sum(numbers) <= budget


def open_in_pieces(folder: Path, budget: int, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline, or a transformer alone, whose weights stay on disk until a block needs them.

    Of a pipeline's other components only those without weights are loaded: it can calibrate and convert, not decode.

    Args:
        folder: a diffusers pipeline or transformer folder.
        budget: bytes that a conversion may take.
        dtype: that float weights are read in.

    Raises:
        ValueError: weights that are not safetensors, a tensor that is missing or misshapen, an unsupported class.
        CheckpointError: a damaged file.
    """
    if not (folder / PIPELINE_FILE).exists():
        return open_streamed(FloatSource.open(folder, dtype), budget)
    names = components(folder)
    models = {n: FloatSource.open(folder / n, dtype) for n in names if n.startswith(TRANSFORMER)}
    for name in names:
        if name not in models:
            stored_files(folder / name)
    parts: dict[str, Any] = {n: None for n in names if n not in models and _has_weights(folder / n)}
    parts |= {name: open_streamed(source, budget) for name, source in models.items()}
    return with_parts(folder, parts)


def with_parts(folder: Path, parts: dict[str, Any]) -> Any:
    """The pipeline of a folder around components that are there already.

    By its own class: `DiffusionPipeline.from_pretrained` forgets a component that its class calls optional, as Wan's
    does its transformers, and loads the folder's.
    """
    index = json.loads((folder / PIPELINE_FILE).read_text(encoding="utf-8"))
    kind = getattr(diffusers, str(index.get("_class_name")), diffusers.DiffusionPipeline)
    return kind.from_pretrained(folder, **parts)


def components(folder: Path) -> list[str]:
    """Names of a pipeline's components that have a folder."""
    index = json.loads((folder / PIPELINE_FILE).read_text(encoding="utf-8"))
    return sorted(name for name in index if (folder / name).is_dir())


def stored_files(folder: Path) -> list[Path]:
    """The files of a component that a copy needs: all but pickles that stand beside safetensors.

    Raises:
        ValueError: weights that are only there as a pickle.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    )
    pickles = [path for path in files if path.suffix in PICKLES]
    if pickles and not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(
            f"{pickles[0]}: is a pickle, and a packed folder holds none; load the pipeline with diffusers once "
            "and save it again with save_pretrained, as safetensors"
        )
    return [path for path in files if path not in pickles]


def check_budget(needed: int, budget: int | None) -> None:
    """ValueError if `needed` bytes do not fit; says what would."""
    if budget is not None and needed > budget:
        raise ValueError(
            f"convert: a memory budget of {format_bytes(budget)} is too small: one block at a time needs "
            f"{format_bytes(needed)}; allow at least {format_bytes(1.01 * needed)}"
        )


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", *PICKLES) for path in folder.rglob("*"))

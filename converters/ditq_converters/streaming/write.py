"""Write the packed folder of a model whose weights stay on disk, from its converted blocks.

It has the very bytes that a conversion in memory saves. Neither the float nor the packed model is ever held.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import nn

from ditq_converters.memory import SLACK, held
from ditq_converters.pipeline_folder import forget_paths, keep_plans
from ditq_converters.streaming import finished
from ditq_converters.streaming.model import Streamed, largest_block, streamed_of
from ditq_converters.streaming.opening import (
    PIPELINE_FILE,
    check_budget,
    components,
    stored_files,
)
from ditq_converters.streaming.source import WEIGHTS
from ditq_converters.streaming.writer import write_safetensors
from ditq_runtime.calls.saved import CALL
from ditq_runtime.families import family_of
from ditq_runtime.files import atomic_folder
from ditq_runtime.format.digests import digest
from ditq_runtime.host.saving import note_digests

WORK = 12  # bytes that a conversion of one block holds at most, over the bytes of its fp32 weights


def check_room(model: nn.Module, out: object) -> None:
    """ValueError if one block at a time does not fit the budget of a streamed model, or it has no `out` to go to."""
    if out is None:
        raise ValueError(
            "convert: a model that is larger than the memory budget needs a folder `out`"
        )
    streamed = _streamed(model)
    work = WORK * largest_block(model, family_of(type(model).__name__))
    check_budget(held(torch.device("cpu")) + SLACK + work, streamed.memory_budget)


@dataclass(frozen=True)
class Piece:
    """One transformer of a folder that is written from disk.

    Attributes:
        model: the streamed float transformer.
        packed: the packed one, its tensors on meta.
        plan: text of the plan that it was made by.
        done: all its blocks.
    """

    model: nn.Module
    packed: nn.Module
    plan: str
    done: finished.FinishedBlocks


def write_streamed(pipe: Any, pieces: dict[str, Piece], out: Path, max_shard_size: str) -> None:
    """Write the packed folder from converted blocks and the source's other tensors, atomically.

    Args:
        pipe: what was opened: a transformer, or a pipeline, whose other components are copied.
        pieces: component -> what was made of it.
        out: the folder.
        max_shard_size: as in diffusers' `save_pretrained`.
    """
    alone = isinstance(pipe, nn.Module)
    with atomic_folder(out) as part:
        if not alone:
            first = next(iter(pieces.values()))
            classes = {name: type(piece.packed).__name__ for name, piece in pieces.items()}
            _copy_components(_streamed(first.model).source.folder.parent, part, classes)
        for name, piece in pieces.items():
            read = _reader(piece.done, _streamed(piece.model))
            _write_transformer(piece.packed, part if alone else part / name, read, max_shard_size)
        forget_paths(part)
        keep_plans(part, {name: piece.plan for name, piece in pieces.items()})
    finished.forget(out)


def _streamed(model: nn.Module) -> Streamed:
    streamed = streamed_of(model)
    assert streamed is not None
    return streamed


def _reader(done: finished.FinishedBlocks, streamed: Streamed) -> Callable[[str], torch.Tensor]:
    files = done.files()

    def read(name: str) -> torch.Tensor:
        if name not in files:
            return streamed.source.read([name])[name]
        with safe_open(files[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    return read


def _write_transformer(
    packed: Any, folder: Path, read: Callable[[str], torch.Tensor], max_shard_size: str
) -> None:
    """What `packed.save_pretrained` would write."""
    digests: dict[str, str] = {}

    def read_and_note(name: str) -> torch.Tensor:
        tensor = read(name).to(tensors[name].dtype)  # what stays float may change its type
        digests[name] = digest(tensor)
        return tensor

    folder.mkdir(exist_ok=True)
    tensors, _ = packed.hf_quantizer.get_state_dict_and_metadata(packed.state_dict(), True)
    write_shards(folder, tensors, read_and_note, max_shard_size)
    note_digests(packed, digests)
    packed.save_config(folder)
    packed.config.quantization_config.digests = {}


def write_shards(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    max_shard_size: str,
) -> None:
    """The weight files of a diffusers model, and their index where there are several; one tensor in memory at a time.

    Args:
        folder: of the model, beside its config.json.
        tensors: name -> a tensor of its dtype and shape, on meta, in the order of `state_dict`.
        read: name -> the tensor itself.
        max_shard_size: as in diffusers' `save_pretrained`.
    """
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=pattern, max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name] for name in names}
        write_safetensors(folder / file, shard, read, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": dict(split.metadata), "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{WEIGHTS}.index.json").write_text(text, encoding="utf-8")


def _copy_components(folder: Path, part: Path, classes: dict[str, str]) -> None:
    """Everything of a pipeline but the transformers of `classes`, file by file; nothing is loaded."""
    for name in components(folder):
        for file in stored_files(folder / name) if name not in classes else ():
            copy = part / name / file.relative_to(folder / name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    if (folder / CALL).exists():
        (part / CALL).parent.mkdir()
        shutil.copyfile(folder / CALL, part / CALL)
    index = json.loads((folder / PIPELINE_FILE).read_text(encoding="utf-8"))
    for name, kind in classes.items():
        index[name] = ["diffusers", kind]  # an old folder says Transformer2DModel
    (part / PIPELINE_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

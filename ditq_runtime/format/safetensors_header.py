"""Read a safetensors header without its data: what a file says it holds, and whether it is all there.

Layout (safetensors format): 8 bytes little-endian header length, the header as JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.rules import shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
KEYS = {"dtype", "shape", "data_offsets"}  # of an entry
MOST, MOST_DIMENSIONS = 1 << 63, 64  # no count comes near; torch has no tensor of more
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header: dtype, shape, size in bytes, and the file that it stands in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a safetensors file; CheckpointError if it is cut off or malformed."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):  # a pipe would wait for ever
        raise CheckpointError(f"{path}: is no file; copy the checkpoint again")
    size = state.st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: truncated, {size} bytes cannot hold its header; copy it again"
            )
        text = file.read(length)
    try:
        header = _parse(text)
        entries = {name: _info(shown(name), entry, path) for name, entry in header.items()}
        end = _end_of_data(entry["data_offsets"] for entry in header.values())
    except _Damaged as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); copy it again") from error
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path}: {size} bytes on disk, {8 + length + end} expected by its header; copy it again"
        )
    return entries


class _Damaged(Exception):
    """What is wrong with a header."""


def _parse(text: bytes) -> dict[str, Any]:
    """The entries of the tensors in a header."""
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        raise _Damaged(str(error)) from error
    if not isinstance(header, dict):
        raise _Damaged(f"it is no object but {shown(header)}")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise _Damaged(f"__metadata__ must be an object of texts, got {shown(notes)}")
    return header


def _info(name: str, entry: Any, path: Path) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != KEYS:
        raise _Damaged(f"{name} must have {sorted(KEYS)}, got {shown(entry)}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise _Damaged(f"{name} has the unknown dtype {shown(entry['dtype'])}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(_counts(name, entry["shape"]))
    offsets = _counts(name, entry["data_offsets"])
    if len(offsets) != 2:
        raise _Damaged(f"{name} must begin and end somewhere, got {shown(offsets)}")
    begin, end = offsets
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise _Damaged(f"{name} has {end - begin} bytes, and its shape needs {shown(expected)}")
    return TensorInfo(dtype, shape, expected, path)


def _counts(name: str, values: Any) -> list[int]:
    known = isinstance(values, list) and len(values) <= MOST_DIMENSIONS
    if not known or not all(type(n) is int and 0 <= n < MOST for n in values):
        raise _Damaged(f"{name} must have lists of counts, got {shown(values)}")
    return list(values)


def _end_of_data(offsets: Iterable[list[int]]) -> int:
    """Where the last tensor ends; tensors may neither overlap nor leave holes."""
    end = 0
    for begin, next_end in sorted(offsets):
        if begin != end:
            raise _Damaged(f"a tensor begins at {begin}, the one before it ends at {end}")
        end = next_end
    return end

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

import torch

from ditq_runtime.errors import CheckpointError

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
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _info(entry, path) for name, entry in header.items()}
            end = _end_of_data(entry["data_offsets"] for entry in header.values())
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise CheckpointError(
                f"{path}: its header is damaged ({error}); copy it again"
            ) from error
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path}: {size} bytes on disk, {8 + length + end} expected by its header; copy it again"
        )
    return entries


def _info(entry: dict, path: Path) -> TensorInfo:
    dtype, shape = DTYPES[entry["dtype"]], tuple(_counts(entry["shape"]))
    begin, end = _counts(entry["data_offsets"])
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise ValueError(f"{end - begin} bytes for a tensor of {expected}")
    return TensorInfo(dtype, shape, expected, path)


def _counts(values: object) -> list[int]:
    if not isinstance(values, list) or not all(type(n) is int and n >= 0 for n in values):
        raise ValueError(f"expected a list of counts, got {values!r}")
    return values


def _end_of_data(offsets: Iterable[list[int]]) -> int:
    """Where the last tensor ends; ValueError if tensors overlap or leave holes."""
    end = 0
    for begin, next_end in sorted(offsets):
        if begin != end:
            raise ValueError(f"a tensor begins at {begin}, the one before it ends at {end}")
        end = next_end
    return end

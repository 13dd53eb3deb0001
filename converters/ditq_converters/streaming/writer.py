"""Write a safetensors file tensor by tensor, with the very bytes that the safetensors library would write.

The library takes all tensors of a file at once; a shard may be larger than memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ditq_runtime.format.safetensors_header import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the header's length; it is padded with spaces
ORDER = (  # of the data: by dtype, in the library's order of its dtypes, then by name
    "I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip


def write_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    metadata: dict[str, str],
) -> None:
    """Write a file, holding one tensor at a time.

    Args:
        path: the file.
        tensors: name -> a tensor of its dtype and shape, on meta or not; values are not read.
        read: name -> the tensor itself, on the CPU.
        metadata: of the file; more than one entry would come in an order that the library does not fix.

    Raises:
        ValueError: what was read has another shape or dtype.
    """
    names = sorted(tensors, key=lambda name: (ORDER.index(NAMES[tensors[name].dtype]), name))
    with path.open("wb") as file:
        file.write(_header(names, tensors, metadata))
        for name in names:
            tensor, expected = read(name), tensors[name]
            if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
                raise ValueError(
                    f"{name}: expected {expected.dtype} {list(expected.shape)}, got {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _header(
    names: list[str], tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]
) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text

"""Digests of stored tensors: they find damage. They are no signature; who can change a file can change its digest.

`page:` and eight hexadecimal digits: the CRC-32 (of zlib) of the text `DTYPE SHAPE` as the safetensors header has them,
`I8 [4608, 1152]`, then of the sums of all whole pages, then of the bytes after the last. A page is 512 little-endian
64-bit words, its sum is modulo 2^64. One flipped bit is always found, as are pages that change places; changes within
one page whose sums cancel are not, such as two words that change places: docs/format.md says what is.

This runs at the speed of memory, a CRC at a fifth of it. Earlier files have sums of larger blocks (`sum:`), or the
CRC-32 of the text and all bytes, with nothing before the digits; they are compared with those.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.rules import Rule, check_value
from ditq_runtime.format.safetensors_header import DTYPES, TensorInfo

CONFIG = (
    "config.json"  # among the digests, the name of that of the configuration beside the tensors
)
NOTES = ("_diffusers_version", "_name_or_path")  # in it, what copies may change
SWITCH = "DITQ_VERIFY"  # environment variable: 0 loads without looking at digests
PAGE = 4096  # bytes
ROWS, COLUMNS = 64, 256  # of words in a block
BLOCK = ROWS * COLUMNS * 8  # bytes, of earlier files
FACTORS = 2 * np.arange(ROWS, dtype=np.uint64) + 1
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def digest(tensor: torch.Tensor) -> str:
    """The digest of a tensor as it would be stored; it is read once, on the CPU."""
    raw, crc = _raw(tensor)
    whole = len(raw) - len(raw) % PAGE
    if whole:
        sums = raw[:whole].view("<u8").reshape(-1, PAGE // 8).sum(axis=1)
        crc = zlib.crc32(sums.astype("<u8", copy=False).data, crc)
    return f"page:{zlib.crc32(raw[whole:].data, crc):08x}"


def _blocks(tensor: torch.Tensor) -> str:
    """The digest of files of a while ago: a sum for each column of a block, row r of it times 2 r + 1."""
    raw, crc = _raw(tensor)
    whole = len(raw) - len(raw) % BLOCK
    if whole:
        words = raw[:whole].view("<u8").reshape(-1, ROWS, COLUMNS)
        crc = zlib.crc32(np.einsum("brc,r->bc", words, FACTORS).astype("<u8").data, crc)
    return f"sum:{zlib.crc32(raw[whole:].data, crc):08x}"


def _crc(tensor: torch.Tensor) -> str:
    """The digest of the first files that had any."""
    raw, crc = _raw(tensor)
    return f"{zlib.crc32(raw.data, crc):08x}"


def _raw(tensor: torch.Tensor) -> tuple[np.ndarray, int]:
    """The bytes of a tensor, and the CRC-32 of its head."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw, zlib.crc32(f"{NAMES[tensor.dtype]} {list(tensor.shape)}".encode())


KINDS: dict[str, Callable[[torch.Tensor], str]] = {"page": digest, "sum": _blocks, "": _crc}


def digests_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name -> digest; of none where a tensor is offloaded, on meta."""
    if any(tensor.is_meta for tensor in tensors.values()):
        return {}
    return {name: digest(tensor) for name, tensor in tensors.items()}


def config_digest(config: Mapping[str, Any]) -> str:
    """The digest of a parsed config.json: the CRC-32 of its JSON, keys sorted and without spaces or digests."""
    content = {key: value for key, value in config.items() if key not in NOTES}
    quantization = dict(content["quantization_config"])
    quantization.pop("digests", None)
    text = json.dumps(
        content | {"quantization_config": quantization}, sort_keys=True, separators=(",", ":")
    )
    return f"{zlib.crc32(text.encode()):08x}"


def check_config(path: object, config: Mapping[str, Any]) -> None:
    """Compare a parsed config.json of a packed model with its digest, where it has one and digests are wanted.

    Raises:
        CheckpointError: they differ, or its digests are none; names the file.
    """
    stored = read_digests(config["quantization_config"].get("digests")).get(CONFIG)
    if stored is None or not wanted():
        return
    found = config_digest(config)
    if found != stored:
        raise CheckpointError(
            f"{path}: is damaged, or was changed by hand: its digest is {found}, it says {stored}; copy it again "
            f"(or set {SWITCH}=0 to load it as it is)"
        )


def read_digests(stored: Any) -> dict[str, str]:
    """The digests of a `quantization_config`; CheckpointError for anything that is none."""
    if stored is None:
        return {}
    check_value("quantization_config: digests", stored, Rule(dict, items=str))
    return dict(stored)


def wanted() -> bool:
    """Whether loading looks at digests: yes, unless the environment says DITQ_VERIFY=0."""
    return os.environ.get(SWITCH, "1") != "0"


def check_digest(
    name: str, tensor: torch.Tensor, digests: Mapping[str, str], headers: Mapping[str, TensorInfo]
) -> None:
    """Compare one tensor, as it was read, with its stored digest.

    Raises:
        CheckpointError: they differ, or there is none; names the file and the tensor.
    """
    if name not in digests:
        raise CheckpointError(
            f"quantization_config: digests: {name} is missing; the config.json is damaged, copy it again"
        )
    kind = digests[name].rpartition(":")[0]
    if kind not in KINDS:
        raise CheckpointError(
            f"quantization_config: digests: {name} has one of an unknown kind, {digests[name][:40]!r}; update ditq "
            f"(or set {SWITCH}=0 to load it as it is)"
        )
    found = KINDS[kind](tensor)
    if found != digests[name]:
        raise CheckpointError(
            f"{headers[name].file}: {name} is damaged: its digest is {found}, config.json says {digests[name]}; "
            f"copy the file again (or set {SWITCH}=0 to load it as it is)"
        )

"""Digests of stored tensors: they find damage. A CRC is no signature; who can change a file can change its digest.

The CRC-32 (of zlib) of the text `DTYPE SHAPE` as the safetensors header has them, `I8 [4608, 1152]`, then of the
tensor's bytes in the file; eight hexadecimal digits.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.rules import Rule, check_value
from ditq_runtime.format.safetensors_header import DTYPES, TensorInfo

SWITCH = "DITQ_VERIFY"  # environment variable: 0 loads without looking at digests
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def digest(tensor: torch.Tensor) -> str:
    """The digest of a tensor as it would be stored; it is read once, on the CPU."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    head = f"{NAMES[tensor.dtype]} {list(tensor.shape)}".encode()
    return f"{zlib.crc32(raw.data, zlib.crc32(head)):08x}"


def digests_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name -> digest; of none where a tensor is offloaded, on meta."""
    if any(tensor.is_meta for tensor in tensors.values()):
        return {}
    return {name: digest(tensor) for name, tensor in tensors.items()}


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
    found = digest(tensor)
    if found != digests[name]:
        raise CheckpointError(
            f"{headers[name].file}: {name} is damaged: its digest is {found}, config.json says {digests[name]}; "
            f"copy the file again (or set {SWITCH}=0 to load it as it is)"
        )

"""The packed checkpoint as bytes: its version, and the headers of its files. docs/format.md describes them.

What makes a checkpoint unacceptable is refused twice: here and in `ditq_runtime.host.check` from the headers, before a
weight is read (names, shapes, dtypes, truncation); then there, on the loaded modules, by value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.rules import shown
from ditq_runtime.format.safetensors_header import TensorInfo, read_header

FORMAT_VERSION = 2
VERSIONS = (1, 2)  # that are read; version 1 is translated when it loads


def check_version(version: Any) -> None:
    """Refuse a checkpoint of another format version."""
    if type(version) is not int or version not in VERSIONS:
        raise CheckpointError(
            f"quantization_config: format_version {shown(version)} is not one of {VERSIONS}, which this ditq reads; "
            "convert the model again, or install the ditq that wrote it"
        )


KEYS = frozenset(
    {"quant_method", "format_version", "scheme", "recipe", "digests"}
)  # of a stored config


def check_stored(quantization: Mapping[str, Any]) -> None:
    """CheckpointError for a `quantization_config` without a version or a scheme, or with what no version has."""
    unknown = sorted(map(str, quantization.keys() - KEYS))
    if unknown:
        raise CheckpointError(
            f"quantization_config: unknown keys {unknown}; copy config.json again"
        )
    for key in ("format_version", "scheme"):
        if key not in quantization:
            raise CheckpointError(
                f"quantization_config: {key} is missing; the config.json is damaged"
            )


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """The merged headers of all shards; CheckpointError for a pickle, a damaged shard or a repeated tensor."""
    merged: dict[str, TensorInfo] = {}
    for path in map(Path, files):
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path}: a packed checkpoint is stored as safetensors only, never as pickle"
            )
        for name, info in read_header(path).items():
            if name in merged:
                raise CheckpointError(f"{path}: tensor {name} is stored in two shards")
            merged[name] = info
    return merged

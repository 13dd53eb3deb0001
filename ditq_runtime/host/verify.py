"""Compare every stored tensor of a packed folder with its digest: while it loads, or without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.digests import check_digest
from ditq_runtime.format.folder import TransformerFolder, transformer_folders
from ditq_runtime.format.safetensors_header import TensorInfo


class Comparison:
    """Compares what is loaded in a thread of its own, while the loader goes on; what it finds is said by `wait`."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        """Of a `quantization_config`."""
        self._digests = digests
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ditq-digests")
        self._begun: list[Future[None]] = []

    def add(self, tensors: Mapping[str, Any], headers: Mapping[str, TensorInfo]) -> None:
        """Begin with the tensors of one shard."""
        self._begun.append(self._pool.submit(_compare, dict(tensors), self._digests, headers))

    def wait(self) -> None:
        """Wait for the end; CheckpointError for the first tensor that differs from its digest, or has none."""
        self._pool.shutdown()
        for one in self._begun:
            one.result()


def _compare(
    tensors: dict[str, Any], digests: Mapping[str, str], headers: Mapping[str, TensorInfo]
) -> None:
    for name, tensor in tensors.items():
        check_digest(name, tensor, digests, headers)


def verify(path: str | Path) -> int:
    """Read a packed folder through and compare its tensors with their digests.

    Args:
        path: a packed transformer folder, or a pipeline folder, of which every packed transformer is read.

    Returns:
        The number of tensors that were compared; 0: the folder holds no digests, as anything that `save_pretrained` of
        ditq's format version 2 did not write.

    Raises:
        CheckpointError: a tensor differs from its digest: names its file; or the folder is damaged otherwise.
    """
    return sum(_verify(folder) for folder in transformer_folders(path).values())


def _verify(folder: TransformerFolder) -> int:
    digests = folder.digests
    if not digests:
        return 0
    folder.check_config()
    for file in folder.files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a dict
                check_digest(name, opened.get_tensor(name), digests, folder.headers)
    missing = sorted(digests.keys() - folder.headers.keys())
    if missing:
        raise CheckpointError(
            f"{folder.path}: {missing[0]} is missing, though config.json has its digest"
        )
    return len(digests)

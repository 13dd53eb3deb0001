"""Compare every stored tensor of a packed folder with its digest."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.digests import check_digest
from ditq_runtime.format.folder import TransformerFolder, transformer_folders


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

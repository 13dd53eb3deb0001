"""Repositories of the hub as local folders: downloaded once, read from the cache where there is no network."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

INDEX, CONFIG = "model_index.json", "config.json"


def local(name: str) -> str:
    """A folder as it is; for `user/repository`, where nothing here has that name, the folder of its snapshot.

    Raises:
        OSError: the repository cannot be reached, or is not there.
    """
    here = name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).exists()
    return name if here else str(snapshot(name))


def is_pipeline(repo_id: str) -> bool:
    """Whether a repository holds a pipeline; False for a transformer alone.

    Raises:
        OSError: it cannot be reached, or is not there.
    """
    try:
        hf_hub_download(repo_id, INDEX)
    except LocalEntryNotFoundError:  # no network, and no index in the cache
        if not isinstance(try_to_load_from_cache(repo_id, CONFIG), str):
            raise OSError(
                f"{repo_id}: no such folder here, not in the hub's cache, and the hub cannot be reached; "
                "check the name, or download it first"
            ) from None
        return False
    except EntryNotFoundError:
        return False
    return True


def snapshot(repo_id: str) -> Path:
    """The local folder of a repository: a pipeline's files as diffusers picks them, or a transformer's.

    Raises:
        OSError: it cannot be reached, or is not there.
    """
    if not is_pipeline(repo_id):
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors"]))
    from diffusers import DiffusionPipeline

    return Path(DiffusionPipeline.download(repo_id))

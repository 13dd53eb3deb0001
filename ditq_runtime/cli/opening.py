"""Open a packed pipeline for a command: in the dtype of its checkpoint, on the device, or offloaded from it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditq_runtime.format.folder import TransformerFolder

DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "layer")


def open_packed(path: str, dtype: str, device: Any, offload: str = "none") -> Any:
    """Open a packed pipeline the way any diffusers user does, after checking that it is one.

    A transformer alone gets the pipeline that diffusers has for it, without encoders and VAE.

    Args:
        path: its folder, or a hub id.
        dtype: of what stays float, as torch names it; "": that of the checkpoint.
        device: a torch.device.
        offload: one of OFFLOADS. "model": one model of the pipeline at a time is on the device, "layer": one layer.

    Raises:
        ValueError: no packed pipeline.
        CheckpointError: a damaged one.
    """
    import torch
    from diffusers import AutoModel, DiffusionPipeline

    import ditq_runtime  # noqa: F401  registers the backend
    from ditq_runtime.calls.pipeline import pipeline_of
    from ditq_runtime.format.folder import open_folder
    from ditq_runtime.host.hub_cache import local

    how = f"`ditq convert {quote(path)} OUT` makes one"
    if path.startswith("demo:"):
        raise ValueError(f"{path} is a built-in float model, not a packed folder; {how}")
    path = local(path)
    folder = open_folder(path)
    if folder.scheme is None:
        raise ValueError(f"{path}: a float model, not a packed one; {how}")
    alone = folder.path == Path(path)
    kind = AutoModel if alone else DiffusionPipeline
    chosen = getattr(torch, dtype or stored_dtype(folder))
    pipe = pipeline_of(kind.from_pretrained(path, dtype=chosen))
    pipe.set_progress_bar_config(disable=True)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "layer":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def stored_dtype(folder: TransformerFolder) -> str:
    """The dtype of most of what a packed transformer keeps float, its packed layers' own tensors aside: torch's name.

    Without any such tensor "float32".
    """
    scheme, bytes_of = folder.scheme, Counter[str]()
    for name, info in folder.headers.items():
        layer, dtype = name.rpartition(".")[0], str(info.dtype).removeprefix("torch.")
        if dtype in DTYPES and (scheme is None or layer not in scheme.layers):
            bytes_of[dtype] += info.nbytes
    return bytes_of.most_common(1)[0][0] if bytes_of else "float32"

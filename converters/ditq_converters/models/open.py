"""Open MODEL: a built-in demo, a diffusers folder, a transformer folder, a hub id, or a `.pt` of DiT's own code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ditq_converters.demo import DEMO_MODELS, open_demo
from ditq_converters.models.facebook_dit import open_facebook_dit
from ditq_converters.streaming.opening import fits, open_in_pieces
from ditq_runtime.calls.parts import transformer_of
from ditq_runtime.format.folder import read_json, refuse_codes_beside
from ditq_runtime.host.hub_cache import is_pipeline, snapshot

TRANSFORMER_FILE = "config.json"
PIPELINE_FILE = "model_index.json"
HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
# plain, or of a variant: NAME[.VARIANT][-00001-of-00002].safetensors
WEIGHTS = re.compile(
    r"diffusion_pytorch_model(?:\.([^.]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)", re.IGNORECASE
)


def open_model(
    model: str, torch_dtype: torch.dtype = torch.float32, memory_budget: int | None = None
) -> Any:
    """Open a float model.

    Args:
        model: `demo:NAME`, a folder with model_index.json (a pipeline) or config.json (a transformer), a hub id,
            or a `.pt` file of DiT's own code.
        torch_dtype: of its weights.
        memory_budget: bytes of main memory; the weights of a model that is too large for it stay on disk until they
            are needed (`streaming`). Such a model can be calibrated and converted; a demo is always loaded.

    Returns:
        A diffusers pipeline; a transformer alone where the folder holds only that.

    Raises:
        ValueError: nothing of that name, an unknown demo, a packed model, a `.pt` file of something else; within a
            memory budget also weights that are no safetensors.
        OSError: a hub id that is not there, or cannot be reached and is not in the cache.
    """
    if model.startswith("demo:"):
        pipe = open_demo(model)
        return pipe if torch_dtype == torch.float32 else pipe.to(torch_dtype)
    path = Path(model)
    if path.suffix in (".pt", ".pth", ".ckpt"):
        return open_facebook_dit(path, torch_dtype)
    if path.is_dir():
        return _open_folder(path, torch_dtype, memory_budget)
    if path.exists() or not HUB_ID.fullmatch(model):
        raise ValueError(
            f"{model}: not a diffusers folder, not a hub id, and not one of {', '.join(DEMO_MODELS)}"
        )
    if memory_budget is not None or not is_pipeline(model):
        return _open_folder(snapshot(model), torch_dtype, memory_budget)
    opened = _from_pretrained("DiffusionPipeline", model, torch_dtype)
    if getattr(transformer_of(opened).config, "quantization_config", None):
        raise ValueError(_packed(model))
    return opened


def open_skeleton(model: str) -> nn.Module:
    """The transformer of a folder without its weights, on meta; of anything else, `open_model`'s.

    Raises:
        ValueError: as `open_model`, or a class that diffusers does not have.
    """
    path = Path(model)
    folder = path / "transformer" if (path / PIPELINE_FILE).exists() else path
    if not (folder / TRANSFORMER_FILE).exists():
        return transformer_of(open_model(model))
    _refuse_packed(folder / TRANSFORMER_FILE)
    import diffusers
    from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config

    config = read_json(folder / TRANSFORMER_FILE)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None:
        raise ValueError(
            f"{folder}: its config.json names the class {config.get('_class_name')!r}, which diffusers does not have"
        )
    if kind is diffusers.Transformer2DModel:  # what old folders say
        kind = _fetch_remapped_cls_from_config(config, kind)
    with init_empty_weights():
        skeleton: nn.Module = kind.from_config(config)
    return skeleton


def alike_beside(model: str) -> dict[str, bool]:
    """The further transformers of a pipeline folder, and whether their layers are those of `transformer`."""
    path = Path(model)
    if not (path / PIPELINE_FILE).exists():
        return {}
    inside = sorted(path.glob(f"transformer*/{TRANSFORMER_FILE}"))
    read = {file.parent.name: read_json(file) for file in inside}
    shapes = {n: {k: v for k, v in c.items() if k != "_name_or_path"} for n, c in read.items()}
    first = shapes.pop("transformer", None)
    return {name: config == first for name, config in shapes.items()}


def _open_folder(path: Path, torch_dtype: torch.dtype, memory_budget: int | None) -> Any:
    kind, inside = "DiffusionPipeline", path / "transformer"
    if not (path / PIPELINE_FILE).exists():
        kind, inside = "AutoModel", path
        if not (path / TRANSFORMER_FILE).exists():
            raise ValueError(
                f"{path}: no {PIPELINE_FILE} and no {TRANSFORMER_FILE} in it, so it is no diffusers model"
            )
    _refuse_packed(inside / TRANSFORMER_FILE)
    if memory_budget is not None and not fits(path, memory_budget):
        return open_in_pieces(path, memory_budget, torch_dtype)
    return _from_pretrained(kind, str(path), torch_dtype, _variant(inside))


def _refuse_packed(config: Path) -> None:
    if not config.exists():
        return
    parsed = read_json(config)
    if parsed.get("quantization_config"):
        raise ValueError(_packed(str(config.parent)))
    refuse_codes_beside(config, parsed)


def _packed(name: str) -> str:
    return f"{name}: is quantized already; give the float model it was made from"


def _variant(folder: Path) -> str | None:
    """The variant (`fp16`, `bf16`, ...) whose weights a transformer's folder holds, where it holds no plain ones.

    Raises:
        ValueError: it holds none, or several, and nothing says which.
    """
    files = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    weights = [match[1] for name in files if (match := WEIGHTS.fullmatch(name))]
    if files and not weights:
        raise ValueError(
            f"{folder}: no diffusion_pytorch_model*.safetensors there; it is incomplete"
        )
    if not weights or None in weights:
        return None  # diffusers takes the plain ones
    variants = sorted(set(filter(None, weights)))
    if len(variants) > 1:
        raise ValueError(
            f"{folder}: holds the variants {' and '.join(variants)} and no other weights; "
            "leave one of them in a folder of its own"
        )
    return variants[0]


def _from_pretrained(
    kind: str, source: str, torch_dtype: torch.dtype, variant: str | None = None
) -> Any:
    import diffusers

    options = {} if variant is None else {"variant": variant}
    return getattr(diffusers, kind).from_pretrained(source, dtype=torch_dtype, **options)

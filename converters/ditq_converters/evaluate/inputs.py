"""Open the packed model and check that the reference is its float twin, before any long work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ditq_converters.calibrate.stats import model_hash
from ditq_runtime.calls.parts import transformers_in
from ditq_runtime.calls.pipeline import pipeline_of

IGNORED = ("quantization_config",)
Models = dict[str, Any]


def open_packed(path: str | Path) -> Any:
    """Open what `ditq convert` wrote: a pipeline, or a transformer alone, in fp32; a folder, or a hub id.

    Raises:
        ValueError: a built-in model, a float model.
        CheckpointError: no model there, or a damaged one.
    """
    from diffusers import AutoModel, DiffusionPipeline

    import ditq_runtime  # noqa: F401  registers the backend
    from ditq_runtime.format.folder import open_folder

    path = check_packed(path)
    folder = open_folder(path)
    kind = AutoModel if folder.path == Path(path) else DiffusionPipeline
    return kind.from_pretrained(str(path))


def check_packed(path: str | Path) -> str:
    """The folder of a packed model, read no further than its headers; raises as `open_packed`."""
    from ditq_runtime.format.folder import open_folder
    from ditq_runtime.host.hub_cache import local

    how = "packed folders are made by `ditq convert MODEL OUT`"
    if str(path).startswith("demo:"):
        raise ValueError(f"{path} is a built-in float model, not a packed folder; {how}")
    path = local(str(path))
    if open_folder(path).scheme is None:
        raise ValueError(f"{path}: a float model, not a packed one; {how}")
    return path


def check_twins(packed: nn.Module, model: nn.Module) -> None:
    """ValueError unless both transformers have one architecture and one configuration; names the first difference."""
    names = [type(module).__name__ for module in (packed, model)]
    if names[0] != names[1]:
        raise ValueError(
            f"reference: expected a {names[0]}, as the packed model is, got a {names[1]}; "
            "give the float model it was made from"
        )
    configs = [_plain(module) for module in (packed, model)]
    for key in sorted(configs[0].keys() | configs[1].keys()):
        ours, theirs = (config.get(key) for config in configs)
        if ours != theirs:
            raise ValueError(
                f"reference: its {key} is {theirs}, that of the packed model is {ours}; "
                "give the float model it was made from"
            )


def warn_of_source(packed: Any, model: nn.Module) -> list[str]:
    """A sentence when the packed model names another float model as its source; it may still be worth comparing."""
    recipe = getattr(packed.config.quantization_config, "recipe", {})
    source = recipe.get("calibration", {}).get("model_hash")
    if source is None or source == model_hash(model):
        return []
    return [
        "the reference is not the model that the packed one was calibrated on (other weights or another dtype)"
    ]


def judge_pipe(packed_pipe: Any, float_pipe: Any) -> Any:
    """Whose scheduler, class names and VAE to use: the reference's, else the packed pipeline's, else diffusers' own."""
    found = next((p for p in (float_pipe, packed_pipe) if not isinstance(p, nn.Module)), float_pipe)
    return pipeline_of(found)


def transformers_of(packed_pipe: Any, float_pipe: Any) -> tuple[Models, Models]:
    """Component -> packed, and -> float transformer: those that are packed, checked to be twins, in eval mode."""
    every, ours = transformers_in(packed_pipe), transformers_in(float_pipe)
    packed = {
        n: m.eval()
        for n, m in every.items()
        if getattr(m.config, "quantization_config", None) is not None
    }  # type: ignore[union-attr]
    if not packed:
        raise ValueError("evaluate: the first model is not packed; convert it first")
    for name, model in packed.items():
        if name not in ours:
            raise ValueError(
                f"reference: has no {name}, and the packed model has; give the float model it was made from"
            )
        check_twins(model, ours[name].eval())
    return packed, {name: ours[name] for name in packed}


def _plain(module: Any) -> dict[str, Any]:
    """The configuration, less what does not shape the model."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dict(module.config).items()
        if not key.startswith("_") and key not in IGNORED
    }

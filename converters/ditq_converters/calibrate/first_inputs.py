"""Sites of a class whose inputs cannot be made from its configuration: found on the first call of somebody's inputs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from ditq_converters.models.open import PIPELINE_FILE, TRANSFORMER_FILE, open_model
from ditq_converters.sites import family_for
from ditq_converters.sites.find import remember
from ditq_converters.sites.first_call import first_call
from ditq_converters.sites.inputs import NoInputs
from ditq_converters.streaming.opening import open_in_pieces, with_parts
from ditq_runtime.calls.inputs import gather
from ditq_runtime.calls.parts import transformer_of, transformers_in
from ditq_runtime.calls.pipeline import draw, pipeline_of, ready


def open_for_call(model: str) -> Any:
    """Open MODEL with the weights of its blocks left on disk: its first call stops before they are needed."""
    path = Path(model)
    if (path / PIPELINE_FILE).exists():
        inner = open_in_pieces(path / "transformer", 0)
        return with_parts(path, {"transformer": inner})
    return open_in_pieces(path, 0) if (path / TRANSFORMER_FILE).exists() else open_model(model)


def find_by_call(pipe: Any, inputs: Path) -> None:
    """Find the sites of a transformer on its first call, where its configuration is not enough.

    They are kept for it, and for another transformer of the same configuration.

    Args:
        pipe: a pipeline, or its transformer alone.
        inputs: a file of calls of the pipeline, as `calibrate` takes; or `.safetensors` of the arguments of one
            forward of the transformer.

    Raises:
        ValueError: a damaged file, arguments that the pipeline does not take, a call that does not reach it.
    """
    model = transformer_of(pipe)
    try:
        family_for(model)
    except NoInputs:
        found = _arguments(model, inputs)
        family = family_for(model, _first(pipe, inputs) if found is None else found)
        for other in transformers_in(pipe).values():
            if type(other) is type(model) and other.config == model.config:
                remember(other, family)


def _arguments(model: nn.Module, path: Path) -> dict[str, Any] | None:
    """The tensors of a file, if they are named as arguments of the model's forward; a single number is one."""
    if path.suffix != ".safetensors":
        return None
    tensors = load_file(path)
    if not set(tensors) <= set(inspect.signature(type(model).forward).parameters):
        return None
    return {name: t if t.dim() else t.item() for name, t in tensors.items()}


def _first(pipe: Any, inputs: Path) -> dict[str, Any]:
    driven = pipeline_of(pipe)
    with ready(driven):
        one = gather("sites", driven, inputs)[0]
        return first_call(transformer_of(pipe), lambda: draw(driven, one))

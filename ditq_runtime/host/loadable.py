"""Whether a packed folder would load, from its config and headers alone: what `from_pretrained` looks at first."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights

from ditq_runtime.errors import CheckpointError
from ditq_runtime.families import family_of
from ditq_runtime.format.folder import TransformerFolder
from ditq_runtime.host import check, skeleton
from ditq_runtime.host.translate import translate


def check_loadable(folder: TransformerFolder) -> None:
    """Build the model on meta and hold the headers against it.

    Raises:
        CheckpointError: what loading would refuse before it reads a weight.
        ValueError: a class that diffusers does not have, or float weights.
    """
    import diffusers

    scheme, headers = folder.scheme, folder.headers
    if scheme is None:
        raise ValueError(f"{folder.path}: is a float model")
    folder.check_config()
    name = str(folder.config.get("_class_name"))
    family_of(name)  # refuses what is no transformer
    config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
    try:
        with init_empty_weights():
            model: Any = getattr(diffusers, name).from_config(config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder.path / 'config.json'}: {name} cannot be made from it ({error}); copy it again"
        ) from error
    skeleton.check_architecture(model, scheme)
    if folder.version1 is not None:
        scheme, headers, _ = translate(model, folder.version1, headers)
    skeleton.install(model, scheme, torch.float32)
    check.check_tensors(headers, model, skeleton.duplicate_embedders(model, scheme))

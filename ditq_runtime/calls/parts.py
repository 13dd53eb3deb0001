"""The transformers of a pipeline, by the names of its components."""

from __future__ import annotations

from typing import Any

from torch import nn


def transformer_of(pipe: Any) -> nn.Module:
    """The transformer of a pipeline, or the transformer itself."""
    return pipe if isinstance(pipe, nn.Module) else pipe.transformer


def transformers_in(pipe: Any) -> dict[str, nn.Module]:
    """Every transformer of a pipeline by the name of its component; `transformer` where it stands alone."""
    if isinstance(pipe, nn.Module):
        return {"transformer": pipe}
    found = {
        name: module
        for name, module in sorted(getattr(pipe, "components", {}).items())
        if name.startswith("transformer") and isinstance(module, nn.Module)
    }
    if not found:
        raise ValueError(
            f"{type(pipe).__name__} has no transformer; expected a diffusers pipeline or its transformer"
        )
    return found

"""Modules whose tensors keep their dtype through every cast of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditq_runtime.errors import CheckpointError


class Pinned(nn.Module):
    """Move with the model, never cast: `.to(bf16)`, `.half()` or fp8 layerwise casting must not spoil a scale."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Torch would round floats to codes without a word."""
        for name, held in self._parameters.items():
            new = state_dict.get(prefix + name)
            if not isinstance(held, torch.Tensor) or not isinstance(new, torch.Tensor):
                continue
            if new.is_floating_point() != held.is_floating_point():
                raise CheckpointError(
                    f"{prefix}{name}: dtype {new.dtype} in the state dictionary, {held.dtype} expected; a float "
                    "model's belongs into the float class"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        held = {name: p.data for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)
        for name, old in held.items():
            new = self._parameters[name]
            if new is not None and new.dtype != old.dtype:
                new.data = old.to(new.device)
        return self

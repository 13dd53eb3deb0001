"""Modules whose tensors keep their dtype through every cast of the model."""

from __future__ import annotations

from typing import Any

from torch import nn


class Pinned(nn.Module):
    """Move with the model, never cast: `.to(bf16)`, `.half()` or fp8 layerwise casting must not spoil a scale."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        held = {name: p.data for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)
        for name, old in held.items():
            new = self._parameters[name]
            if new is not None and new.dtype != old.dtype:
                new.data = old.to(new.device)
        return self

"""What importing `ditq_runtime` adds to diffusers: the quantizer, the attention backends, two guards.

It runs while something of ours or a user's imports diffusers, so it may not import what imports diffusers in turn.
"""

from __future__ import annotations

import importlib
from typing import Any

from diffusers.quantizers import auto

from ditq_runtime.attention.dispatcher import register_attention_backends
from ditq_runtime.host.door import watch_configs
from ditq_runtime.host.guards import watch_wrapping


class Later:
    """Stands for a class until it is used: called, or asked for an attribute."""

    def __init__(self, module: str, name: str) -> None:
        """Remember where the class is."""
        self._home = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """An instance of the class."""
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the class."""
        return getattr(self._real(), name)

    def __instancecheck__(self, instance: Any) -> bool:
        """`isinstance` of the class."""
        return isinstance(instance, self._real())

    def _real(self) -> Any:
        module, name = self._home
        return getattr(importlib.import_module(module), name)


def enter_diffusers() -> None:
    """Make diffusers know ditq."""
    plugin = "ditq_runtime.host.plugin"
    auto.AUTO_QUANTIZER_MAPPING.setdefault("ditq", Later(plugin, "DitqQuantizer"))
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("ditq", Later(plugin, "DitqConfig"))
    register_attention_backends()
    watch_wrapping()
    watch_configs()

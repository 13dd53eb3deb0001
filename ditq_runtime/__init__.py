"""Play packed low-bit Diffusion Transformers. Importing this package registers the `ditq` backend with diffusers.

    import ditq_runtime as ditq
    pipe = DiffusionPipeline.from_pretrained("out", dtype=torch.bfloat16)
    print(ditq.execution_report(pipe.transformer))

Importing is free: names load when they are used, and diffusers is told when it is there. No GPU, no network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ditq_runtime.host.on_import import after_import

if TYPE_CHECKING:
    from ditq_runtime.errors import CheckpointError, FallbackError
    from ditq_runtime.format.checkpoint import FORMAT_VERSION
    from ditq_runtime.format.layer import LayerFormat
    from ditq_runtime.format.scheme import Scheme
    from ditq_runtime.host.config import DitqConfig
    from ditq_runtime.host.configure import configure
    from ditq_runtime.host.hub import push_to_hub
    from ditq_runtime.host.plugin import DitqQuantizer, register
    from ditq_runtime.layers.linear import QuantLinear
    from ditq_runtime.lora.adapter import load_lora
    from ditq_runtime.lora.switch import set_lora, unload_lora
    from ditq_runtime.report.execution import ExecutionReport, LayerRun, execution_report
    from ditq_runtime.speed.backend.report import CompiledGraph, compile_report
    from ditq_runtime.speed.prepare import Prepared, prepare
    from ditq_runtime.version import __version__

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "CompiledGraph",
    "DitqConfig",
    "DitqQuantizer",
    "ExecutionReport",
    "FallbackError",
    "LayerFormat",
    "LayerRun",
    "Prepared",
    "QuantLinear",
    "Scheme",
    "__version__",
    "compile_report",
    "configure",
    "execution_report",
    "load_lora",
    "prepare",
    "push_to_hub",
    "register",
    "set_lora",
    "unload_lora",
]

_HOME = {
    "FORMAT_VERSION": "format.checkpoint",
    "CheckpointError": "errors",
    "CompiledGraph": "speed.backend.report",
    "DitqConfig": "host.config",
    "DitqQuantizer": "host.plugin",
    "ExecutionReport": "report.execution",
    "FallbackError": "errors",
    "LayerFormat": "format.layer",
    "LayerRun": "report.execution",
    "Prepared": "speed.prepare",
    "QuantLinear": "layers.linear",
    "Scheme": "format.scheme",
    "__version__": "version",
    "compile_report": "speed.backend.report",
    "configure": "host.configure",
    "execution_report": "report.execution",
    "load_lora": "lora.adapter",
    "prepare": "speed.prepare",
    "push_to_hub": "host.hub",
    "register": "host.plugin",
    "set_lora": "lora.switch",
    "unload_lora": "lora.switch",
}


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


after_import("diffusers", "ditq_runtime.host.enter:enter_diffusers")
after_import("peft", "ditq_runtime.lora.branch:enter_peft")
after_import("diffusers.loaders.lora_pipeline", "ditq_runtime.lora.flux_loader:enter_flux_loader")
after_import("diffusers.loaders.lora_base", "ditq_runtime.lora.wrapped:enter_lora_base")

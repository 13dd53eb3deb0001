"""Play packed low-bit Diffusion Transformers. Importing this package registers the `ditq` backend with diffusers.

    import ditq_runtime as ditq
    pipe = DiffusionPipeline.from_pretrained("out", dtype=torch.bfloat16)
    print(ditq.execution_report(pipe.transformer))

Importing touches no GPU and no network, and loads none of our Triton kernels.
"""

from ditq_runtime.attention.backend import register_attention_backends
from ditq_runtime.errors import CheckpointError, FallbackError
from ditq_runtime.format.checkpoint import FORMAT_VERSION
from ditq_runtime.format.scheme import LayerFormat, Scheme
from ditq_runtime.host.configure import configure
from ditq_runtime.host.guards import watch_wrapping
from ditq_runtime.host.hub import push_to_hub
from ditq_runtime.host.plugin import DitqConfig, DitqQuantizer, register
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.lora.adapter import load_lora, unload_lora
from ditq_runtime.report.execution import ExecutionReport, LayerRun, execution_report
from ditq_runtime.speed.prepare import Prepared, prepare

register()
register_attention_backends()
watch_wrapping()

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "DitqConfig",
    "DitqQuantizer",
    "ExecutionReport",
    "FallbackError",
    "LayerFormat",
    "LayerRun",
    "Prepared",
    "QuantLinear",
    "Scheme",
    "configure",
    "execution_report",
    "load_lora",
    "prepare",
    "push_to_hub",
    "register",
    "unload_lora",
]

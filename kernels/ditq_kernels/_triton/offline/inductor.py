"""The code that Inductor generates for a CUDA GPU, where there is none: to the source, and no further.

For counting launches. It changes torch in this process: use one of its own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import fx
from torch._dynamo import device_interface
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.fx_passes import reinplace
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget

CUDA = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="no GPU", major=9, minor=0, gcnArchName="", multi_processor_count=132, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    total_memory=80 << 30, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10, L2_cache_size=50 << 20,
)  # fmt: skip


class _GeneratedError(Exception):
    """The source is there."""


def install() -> None:
    """Let Inductor take this process for one with a GPU of compute capability 9.0, as far as its source."""
    device_interface.init_device_reg()
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, _NoGpu)
    torch.version.cuda = "13.0"
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda device=None: PROPERTIES
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    triton.runtime.driver.set_active(_Driver())
    reinplace._inplace_generalized_scatter = _or_its_input(reinplace._inplace_generalized_scatter)


def source(graph: fx.GraphModule, settings: dict[str, Any]) -> str:
    """What Inductor generates for a graph of aten operators that was traced on a CPU.

    Args:
        graph: as AOTAutograd gives it to a compiler; it is changed.
        settings: of Inductor.

    Returns:
        The module: Triton kernels, and a function `call` that launches them.
    """
    fakes, inputs = FakeTensorMode(allow_non_fake_inputs=True), list[Any]()
    with fakes, torch.no_grad():
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                inputs.append(_on_cuda(node.meta["val"]))
            elif node.op == "get_attr":
                setattr(graph, node.target, _on_cuda(getattr(graph, node.target)))
            elif "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": CUDA}
    graph.recompile()
    found: list[str] = []

    def stop(lowering: GraphLowering) -> None:
        found.append(lowering.codegen()[0].value)
        raise _GeneratedError

    once = {"fx_graph_cache": False, "force_disable_caches": True, "compile_threads": 1}
    compile_to_module = GraphLowering.compile_to_module
    GraphLowering.compile_to_module = stop  # type: ignore[assignment,method-assign]
    try:
        with torch.no_grad(), config.patch({**once, **settings}), tracing(TracingContext(fakes)):
            FakeTensorProp(graph, fakes).propagate_dont_convert_inputs(*inputs)
            compile_fx_inner(graph, inputs)
    except Exception:
        if not found:
            raise
    finally:
        GraphLowering.compile_to_module = compile_to_module  # type: ignore[method-assign]
    return found[0]


def _on_cuda(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)


def _or_its_input(scatter: Any) -> Any:
    """One pass runs operators that only a GPU has; what it would leave has the same launches."""

    def run(whole: Any, part: Any, views: Any) -> Any:
        try:
            return scatter(whole, part, views)
        except RuntimeError:
            return whole

    return run


class _NoGpu(device_interface.CudaInterface):
    class Worker:
        set_device = staticmethod(lambda device: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: PROPERTIES)

    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)
    exchange_device = staticmethod(lambda device: 0)
    maybe_exchange_device = staticmethod(lambda device: 0)
    device_count = staticmethod(lambda: 1)
    get_device_properties = staticmethod(lambda device=None: PROPERTIES)  # type: ignore[assignment]
    is_available = staticmethod(lambda: True)
    synchronize = staticmethod(lambda device=None: None)
    get_compute_capability = staticmethod(lambda device=None: 90)
    get_raw_stream = staticmethod(lambda index: 0)
    current_stream = staticmethod(lambda: None)  # type: ignore[assignment]
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)


class _Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=0: 0)
    get_active_torch_device = staticmethod(lambda: CUDA)
    get_device_interface = staticmethod(lambda: _NoGpu)

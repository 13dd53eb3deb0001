"""One denoising step and a whole sampling run of a model: eager, compiled, replayed from a CUDA graph."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ditq_bench.timing import Timing, time_in_turn

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class ModelRow:
    """One way to run one step, or a whole run.

    Attributes:
        what: "step" or "run".
        mode: "eager", "compiled", "graph"; of a run also "hoisted", and a graph is hoisted too (`ditq.prepare`).
        warm_up: seconds of the first call: compilation, capture, caches.
        timing: seconds of later calls; None where the mode cannot run.
        skipped: why it did not run; "" if it did.
    """

    what: str
    mode: str
    warm_up: float
    timing: Timing | None
    skipped: str = ""


@dataclass(frozen=True)
class Step:
    """One call of a transformer, as the pipeline makes it."""

    transformer: Callable[..., Any]
    arguments: tuple
    keywords: dict[str, Any]

    def __call__(self) -> Any:
        """Run it without gradients."""
        with torch.no_grad():
            return self.transformer(*self.arguments, **self.keywords)


def sample_once(pipe: Any, images: int, steps: int, size: dict[str, int] | None = None) -> Any:
    """A sampling run with fixed seeds: by class where the pipeline takes classes, by prompt elsewhere."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
    asked: dict[str, Any] = {"prompt": ["a photograph"] * images}
    if hasattr(pipe.transformer.config, "num_embeds_ada_norm") and not hasattr(pipe, "tokenizer"):
        classes = pipe.transformer.config.num_embeds_ada_norm or 1
        asked = {"class_labels": [image % classes for image in range(images)]}
    return pipe(**asked, generator=generators, num_inference_steps=steps, **(size or {}))


def recorded_step(pipe: Any, images: int, size: dict[str, int] | None = None) -> Step:
    """The last transformer call of a short run."""
    calls: list[Step] = []

    def record(module: torch.nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        calls.append(Step(module, arguments, keywords))

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        sample_once(pipe, images, WARM_UP_STEPS, size)
    finally:
        handle.remove()
    return calls[-1]


def bench_step(
    step: Step, device: torch.device, modes: tuple[str, ...], budget: float
) -> Iterator[ModelRow]:
    """Time one step in every mode; a mode that cannot run here says why."""
    for mode in modes:
        try:
            begin = time.perf_counter()
            run = MODES[mode](step, device)
            run()
            _wait(device)
            warm_up = time.perf_counter() - begin
        except (RuntimeError, NotImplementedError) as error:
            yield ModelRow("step", mode, 0.0, None, " ".join(str(error).split())[:200])
            continue
        timing = time_in_turn({mode: run}, device, rounds=20, budget=budget / len(modes))[mode]
        yield ModelRow("step", mode, warm_up, timing)


@dataclass(frozen=True)
class Sampling:
    """Whole sampling runs, decoding included."""

    pipe: Any
    images: int
    steps: int
    size: dict[str, int] | None = None

    def __call__(self) -> Any:
        """Sample once."""
        return sample_once(self.pipe, self.images, self.steps, self.size)


def bench_run(
    sampling: Sampling, device: torch.device, modes: tuple[str, ...], budget: float
) -> Iterator[ModelRow]:
    """Time sampling runs in every mode; a mode that this model or device does not have says why."""
    for mode in modes:
        begin = time.perf_counter()
        try:
            with RUN_MODES[mode](sampling.pipe, device):
                sampling()
                _wait(device)
                warm_up = time.perf_counter() - begin
                share = budget / len(modes)
                timing = time_in_turn({mode: sampling}, device, rounds=5, budget=share)[mode]
        except (RuntimeError, ValueError, NotImplementedError) as error:
            yield ModelRow("run", mode, 0.0, None, " ".join(str(error).split())[:200])
            continue
        yield ModelRow("run", mode, warm_up, timing)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Bytes at the peak inside: of the CUDA allocator, or of this whole process on a CPU."""
    found: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    else:
        found["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _eager(step: Step, _: torch.device) -> Callable[[], Any]:
    return step


def _compiled(step: Step, _: torch.device) -> Callable[[], Any]:
    compiled = torch.compile(step.transformer, dynamic=False)
    return Step(compiled, step.arguments, step.keywords)


def _graph(step: Step, device: torch.device) -> Callable[[], Any]:
    if device.type != "cuda":
        raise NotImplementedError("a CUDA graph needs a GPU")
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles and fills caches before the capture
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


MODES: dict[str, Callable[[Step, torch.device], Callable[[], Any]]] = {
    "eager": _eager,
    "compiled": _compiled,
    "graph": _graph,
}


@contextmanager
def _run_eager(*_: Any) -> Iterator[None]:
    yield


@contextmanager
def _run_compiled(pipe: Any, _: torch.device) -> Iterator[None]:
    pipe.transformer.compile(dynamic=False)
    try:
        yield
    finally:
        pipe.transformer._compiled_call_impl = None


def _run_prepared(cuda_graph: bool) -> Callable[[Any, torch.device], AbstractContextManager]:
    @contextmanager
    def prepared(pipe: Any, _: torch.device) -> Iterator[None]:
        import ditq_runtime as ditq

        handle = ditq.prepare(pipe, cuda_graph=cuda_graph)
        try:
            yield
        finally:
            handle.undo()

    return prepared


RUN_MODES: dict[str, Callable[[Any, torch.device], AbstractContextManager]] = {
    "eager": _run_eager,
    "compiled": _run_compiled,
    "hoisted": _run_prepared(cuda_graph=False),
    "graph": _run_prepared(cuda_graph=True),
}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

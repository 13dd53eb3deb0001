"""The forward of a transformer as CUDA graphs, one per set of input shapes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ditq_runtime.layers.carrier import here
from ditq_runtime.speed.hoist import places_of

WARM_UPS = 3  # before a capture, as torch's documentation asks
KEPT = 8  # sets of shapes; the one that was not used for longest is freed
TIMED = 3  # forwards each way, where it is measured whether a graph helps; the fastest counts
WORTH = 0.97  # of the time without a graph, at most


class Measured(NamedTuple):
    """What a forward took on its device, in seconds, and the shapes of what it was given."""

    shapes: tuple[tuple[int, ...], ...]
    eager: float
    graph: float

    @property
    def helps(self) -> bool:
        """A graph is replayed from now on."""
        return self.graph <= WORTH * self.eager

    def __str__(self) -> str:
        """One sentence."""
        shown = " ".join(str(list(shape)) for shape in self.shapes)
        taken = "replayed" if self.helps else "not taken"
        return f"inputs {shown}: graph {1e3 * self.graph:.2f} ms, {1e3 * self.eager:.2f} ms without; {taken}"


class Captured(NamedTuple):
    """A graph, the memory that its inputs are copied to, and what its replays write. No graph: it did not help."""

    graph: Any
    fixed: list[torch.Tensor]
    output: Any


class GraphedForward:
    """Replaces one model's `forward` by replays; outputs are copies, so a caller may keep them.

    Inputs are the arguments, tensors inside of dictionaries too, and what travels with a forward (`carrier`): the
    timestep, and the hoisted modulation, which changes from step to step. They are copied to fixed addresses; nothing
    is looked for in the model. Threads take turns; each stream has graphs of its own, whose memory no other stream
    writes. Weights that moved are captured anew.

    Attributes:
        measured: for each set of shapes, what was found where a graph need not help.
        replays: see `carrier.REPLAYS`.
    """

    replays = True

    def __init__(self, model: nn.Module, always: bool = True) -> None:
        """Install; graphs are captured at their first use, on the model's device; kept `always`, or where they help."""
        self._always, self.measured = always, list[Measured]()
        self._model: Any = model
        self._forward = model.forward
        self._first = next(model.parameters())
        self._captured: dict[tuple[Any, ...], Captured] = {}
        self._turn = threading.Lock()
        self._model.forward = self._replay

    def remove(self) -> None:
        """Give the model its forward back and free the graphs."""
        del self._model.forward
        while self._captured:
            self._free_oldest()

    def _replay(self, *args: Any, **kwargs: Any) -> Any:
        with self._turn:
            return self._replay_alone(args, kwargs)

    def _replay_alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors: list[torch.Tensor] = []
        key: list[Any] = [_stream(self._first.device), self._first.data_ptr()]
        _take_apart(args, tensors, key)
        _take_apart(kwargs, tensors, key)
        forward = here()
        place = _place_of(forward.timestep, tensors)
        _take_apart(forward.timestep if place < 0 else None, tensors, key)
        hoisted: Any = forward.hoisted or {}
        memory = getattr(hoisted, "memory", None)
        tensors += hoisted.values() if memory is None else [memory]
        key += (place, getattr(hoisted, "key", None) or places_of(hoisted))
        found = self._captured.pop(tuple(key), None)
        if found is None:
            found = self._capture(args, kwargs, tensors, place)
        self._captured[tuple(key)] = found
        if len(self._captured) > KEPT:
            self._free_oldest()
        if found.graph is None:
            return self._forward(*args, **kwargs)
        torch._foreach_copy_(found.fixed, tensors)
        found.graph.replay()
        output = found.output
        if isinstance(output, tuple):
            return tuple(value.clone() for value in output)
        return type(output)(**{name: value.clone() for name, value in output.items()})

    def _capture(self, args: Any, kwargs: Any, tensors: list[torch.Tensor], place: int) -> Captured:
        device = self._first.device
        fixed = [tensor.detach().to(device, copy=True) for tensor in tensors]
        rest = iter(fixed)
        args, kwargs = _put_together(args, rest), _put_together(kwargs, rest)
        forward = here()
        timestep = forward.timestep
        hoisted: Any = forward.hoisted
        if timestep is not None:
            forward.timestep = fixed[place] if place >= 0 else _put_together(timestep, rest)
        if hoisted:
            memory = getattr(hoisted, "memory", None)
            forward.hoisted = (
                dict(zip(hoisted, rest, strict=True)) if memory is None else hoisted.on(next(rest))
            )
        try:

            def run() -> Any:
                return self._forward(*args, **kwargs)

            graph, output = _record(run, device)
            if self._always or self._helps(run, graph, fixed):
                return Captured(graph, fixed, output)
            graph.reset()
            return Captured(None, [], None)
        finally:
            forward.timestep, forward.hoisted = timestep, hoisted

    def _helps(self, run: Callable[[], Any], graph: Any, fixed: list[torch.Tensor]) -> bool:
        """Time forwards with and without a graph, and note it."""
        with torch.no_grad():
            ways = [
                min(_seconds(way, self._first.device) for _ in range(TIMED))
                for way in (run, graph.replay)
            ]
        self.measured.append(Measured(tuple(tuple(one.shape) for one in fixed), *ways))
        return self.measured[-1].helps

    def _free_oldest(self) -> None:
        oldest = self._captured.pop(next(iter(self._captured)))
        if oldest.graph is not None:
            oldest.graph.reset()


def _take_apart(value: Any, tensors: list[torch.Tensor], key: list[Any]) -> None:
    """Tensors of nested arguments, in order, and all else that a graph depends on."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        key += [value.shape, value.dtype]
    elif isinstance(value, dict):
        for name, one in value.items():
            key.append(name)
            _take_apart(one, tensors, key)
        key.append(dict)
    elif isinstance(value, tuple | list):
        for one in value:
            _take_apart(one, tensors, key)
        key.append(type(value))
    else:
        key += [type(value), value if value is None else repr(value)]


def _put_together(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The same arguments with other tensors in their places."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {name: _put_together(one, tensors) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([_put_together(one, tensors) for one in value])
    return value


def _place_of(timestep: torch.Tensor | None, tensors: list[torch.Tensor]) -> int:
    """Which argument the carried timestep is; -1: none."""
    return next((i for i, one in enumerate(tensors) if one is timestep), -1)


def _stream(device: torch.device) -> int:
    """The stream that this thread works on, on a device."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """From an idle device to an idle device."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _record(forward: Any, device: torch.device) -> tuple[Any, Any]:
    """A CUDA graph of a call on a device, and the output that its replays write."""
    with torch.no_grad(), torch.cuda.device(device):
        now, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(now)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                forward()
        now.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = forward()
    return graph, output

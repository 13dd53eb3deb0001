"""The forward of a transformer as CUDA graphs, one per set of input shapes."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ditq_runtime.layers.carrier import here

WARM_UPS = 3  # before a capture, as torch's documentation asks


class GraphedForward:
    """Replaces one model's `forward` by replays; outputs are copies, so a caller may keep them.

    Inputs are copied to fixed addresses, among them those inside of dictionaries, and what reaches the blocks aside:
    the hoisted modulation, which changes from step to step, and the timestep. Threads take turns; each stream has
    graphs of its own, whose memory no other stream writes.
    """

    def __init__(self, model: nn.Module) -> None:
        """Install; graphs are captured at their first use."""
        self._model: Any = model
        self._forward = model.forward
        self._captured: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._turn = threading.Lock()
        self._model.forward = self._replay

    def remove(self) -> None:
        """Give the model its forward back and free the graphs."""
        del self._model.forward
        self._captured.clear()

    def _replay(self, *args: Any, **kwargs: Any) -> Any:
        with self._turn:
            return self._replay_alone(*args, **kwargs)

    def _replay_alone(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        aside = here().hoisted or {}
        values = [*leaves, here().timestep, *aside.values()]
        tensors = {i: v for i, v in enumerate(values) if isinstance(v, torch.Tensor)}
        rest = [(i, repr(v)) for i, v in enumerate(values) if i not in tensors]
        shapes = ((i, t.shape, t.dtype) for i, t in tensors.items())
        key = (*shapes, *rest, repr(spec), tuple(map(id, aside)), _stream())
        if key not in self._captured:
            self._captured[key] = self._capture(values, tensors, spec, list(aside))
        graph, fixed, output = self._captured[key]
        for i, tensor in tensors.items():
            fixed[i].copy_(tensor)
        graph.replay()
        if isinstance(output, tuple):
            return tuple(value.clone() for value in output)
        return type(output)(**{name: value.clone() for name, value in output.items()})

    def _capture(
        self,
        values: list[Any],
        tensors: dict[int, torch.Tensor],
        spec: TreeSpec,
        holders: list[nn.Module],
    ) -> tuple[Any, ...]:
        fixed = {i: tensor.detach().clone() for i, tensor in tensors.items()}
        given = [fixed.get(i, value) for i, value in enumerate(values)]
        args, kwargs = tree_unflatten(given[: spec.num_leaves], spec)
        forward, (timestep, *hoisted) = here(), given[spec.num_leaves :]
        forward.timestep = timestep
        forward.hoisted = dict(zip(holders, hoisted, strict=True)) or None
        graph, output = _record(lambda: self._forward(*args, **kwargs))
        return graph, fixed, output


def _stream() -> int:
    """The stream that this thread works on."""
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0


def _record(forward: Any) -> tuple[Any, Any]:
    """A CUDA graph of a call, and the output that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = forward()
    return graph, output

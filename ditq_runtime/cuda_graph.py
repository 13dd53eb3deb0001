"""The forward of a transformer as CUDA graphs, one per set of input shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditq_runtime.families.adaln import HOISTED

WARM_UPS = 3  # before a capture, as torch's documentation asks


class GraphedForward:
    """Replaces one model's `forward` by replays; outputs are copies, so a caller may keep them.

    Inputs are copied to fixed addresses, among them the hoisted modulation, which changes from step to step.
    """

    def __init__(self, model: nn.Module) -> None:
        """Install; graphs are captured at their first use."""
        self._model: Any = model
        self._forward = model.forward
        self._captured: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._model.forward = self._replay

    def remove(self) -> None:
        """Give the model its forward back and free the graphs."""
        del self._model.forward
        self._captured.clear()

    def _replay(self, *args: Any, **kwargs: Any) -> Any:
        inputs = {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
        tensors = {n: t for n, t in inputs.items() if isinstance(t, torch.Tensor)}
        holders = [h for m in self._model.modules() if (h := getattr(m, HOISTED, None)) is not None]
        hoisted = [holder.value for holder in holders]
        tensors |= {f"hoisted.{i}": t for i, t in enumerate(hoisted) if t is not None}
        rest = sorted((n, repr(v)) for n, v in inputs.items() if n not in tensors)
        key = (*((n, t.shape, t.dtype) for n, t in tensors.items()), *rest)
        if key not in self._captured:
            self._captured[key] = self._capture(args, kwargs, tensors, holders)
        graph, fixed, output = self._captured[key]
        for name, tensor in tensors.items():
            fixed[name].copy_(tensor)
        graph.replay()
        if isinstance(output, tuple):
            return tuple(value.clone() for value in output)
        return type(output)(**{name: value.clone() for name, value in output.items()})

    def _capture(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: dict[str, torch.Tensor],
        holders: list[Any],
    ) -> tuple[Any, ...]:
        fixed = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        args = tuple(fixed.get(str(i), arg) for i, arg in enumerate(args))
        kwargs = {name: fixed.get(name, value) for name, value in kwargs.items()}
        for i, holder in enumerate(holders):
            holder.value = fixed.get(f"hoisted.{i}")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            output = self._forward(*args, **kwargs)
        return graph, fixed, output

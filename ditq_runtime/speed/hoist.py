"""Modulation computed once for all steps: AdaLN's shift, scale and gate depend on the timestep and on what stays.

A third of a DiT's weights is modulation, read at every step for a handful of rows. Hoisted, they are read once per
sampling run, for all its steps together. What it depends on beside the timestep, and how it is computed, a family says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditq_runtime.families.adaln import HOISTS
from ditq_runtime.families.family import Hoistable
from ditq_runtime.layers.carrier import PerThread, here


class _Run(PerThread):
    """What one thread samples with.

    Attributes:
        step: its place in the schedule that was announced; -1: none.
        key: what the values depend on.
        held: the tensors in the key, so that an id is not used again.
        values: of every holder, for each step.
    """

    def __init__(self) -> None:
        self.step = -1
        self.key: tuple[Any, ...] = ()
        self.held: tuple[Any, ...] = ()
        self.values: list[dict[nn.Module, torch.Tensor]] = []


class Hoist:
    """Watches one pipeline's scheduler and transformer; see `ditq_runtime.speed.prepare`.

    The scheduler is asked to scale the model's input right before the model is called: its place in the schedule is
    known there, and no device has to be waited for. A forward whose timestep was not announced so, is none of the
    scheduler's, or differs from it, computes its modulation as ever; so does one whose weights still wait on another
    device, as offloading moves them after this.

    Attributes:
        tables: how often modulation was computed for a whole schedule.
        hits: forwards that used it.
        holders: the modules it computes for.
    """

    def __init__(self, model: Any, scheduler: Any, hoistable: Hoistable) -> None:
        """Install."""
        self.tables, self.hits = 0, 0
        self._model, self._scheduler, self._run = model, scheduler, _Run()
        self._hoistable, self.holders = hoistable, hoistable.holders(model)
        setattr(model, HOISTS, [*getattr(model, HOISTS, ()), self])
        self._scale = scheduler.scale_model_input
        scheduler.scale_model_input = self._announced
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Uninstall; every forward computes its modulation again."""
        del self._scheduler.scale_model_input
        for hook in self._hooks:
            hook.remove()
        getattr(self._model, HOISTS).remove(self)

    def _announced(self, sample: torch.Tensor, timestep: Any = None, *args: Any, **kw: Any) -> Any:
        self._run.step = _position(self._scheduler.timesteps, timestep)
        return self._scale(sample, timestep, *args, **kw)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self._run
        step, run.step = run.step, -1
        timestep, conditions = kwargs.get("timestep"), self._hoistable.conditions(kwargs)
        if step < 0 or timestep is None or conditions is None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        steps = self._scheduler.timesteps
        if timestep.device.type == "cpu" and not bool((timestep == steps[step]).all()):
            return
        batch = len(conditions[0] if conditions else hidden)
        contents = tuple((id(c), 0 if c.is_inference() else c._version) for c in conditions)
        key = (contents, id(steps), batch, timestep.dtype, hidden.dtype)
        if key != run.key:
            if _elsewhere(self.holders, hidden.device):
                return
            timesteps = steps.to(timestep).repeat_interleave(batch)
            rows = tuple(c.repeat(len(steps), *[1] * (c.dim() - 1)) for c in conditions)
            with torch.no_grad():
                values = self._hoistable.compute(model, timesteps, rows, hidden.dtype)
            run.values = _by_step(self.holders, values, len(steps))
            here().index = None  # of all steps
            run.held, run.key = (conditions, steps), key
            self.tables += 1
        here().hoisted = run.values[step]
        self.hits += 1

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        here().hoisted = None


class HoistedRows(dict[nn.Module, torch.Tensor]):
    """Module -> modulation [B, N] of one step, all in one memory, which a CUDA graph copies at once.

    Attributes:
        memory: one row of numbers.
    """

    def __init__(self, holders: list[nn.Module], widths: list[int], memory: torch.Tensor) -> None:
        """Holders share a memory in order; widths are N."""
        self._widths, self.memory = widths, memory
        batch = len(memory) // sum(widths)
        parts = memory.split([batch * width for width in widths])
        shaped = (part.view(batch, -1) for part in parts)
        super().__init__(zip(holders, shaped, strict=True))

    def on(self, memory: torch.Tensor) -> HoistedRows:
        """The same of another memory."""
        return HoistedRows(list(self), self._widths, memory)


def _by_step(
    holders: list[nn.Module], values: list[torch.Tensor], steps: int
) -> list[dict[nn.Module, torch.Tensor]]:
    """What each step looks up, of values [S * B, N] of all steps."""
    if len({value.dtype for value in values}) > 1:
        return [
            dict(zip(holders, now, strict=True))
            for now in zip(*(value.chunk(steps) for value in values), strict=True)
        ]
    memory = torch.cat([value.reshape(steps, -1) for value in values], dim=1)
    widths = [value.shape[1] for value in values]
    return [HoistedRows(holders, widths, row) for row in memory]


def _elsewhere(modules: list[nn.Module], device: torch.device) -> bool:
    """Weights wait on another device; those on meta come with hooks of their own when a module is called."""
    places = {p.device for module in modules for p in module.parameters()}
    return bool(places - {device, torch.device("meta")})


def _position(steps: torch.Tensor, timestep: Any) -> int:
    """Where a timestep stands in a schedule [S]; -1: nowhere."""
    if isinstance(timestep, torch.Tensor) and steps.is_contiguous():
        memory = [t.untyped_storage().data_ptr() for t in (timestep, steps)]
        if memory[0] == memory[1]:  # an element of it, as in `for t in steps`: no device is asked
            return int(timestep.storage_offset() - steps.storage_offset())
    found = (steps == timestep).nonzero()
    return int(found[0]) if len(found) else -1

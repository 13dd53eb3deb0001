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
from ditq_runtime.host.guards import adapters_made
from ditq_runtime.layers.carrier import PerThread, here

SCALE = "scale_model_input"  # what most pipelines ask their scheduler to do before each forward
NOTED = "_current_timestep"  # where newer pipelines note the timestep they are at
LAYER_NAMES = "adapter_layer_names"  # attribute of what holds adapters: PEFT's layers, and ours
KEPT = 2  # tables of one schedule: guidance may call the model with two prompts in turn


class _Run(PerThread):
    """What one thread samples with.

    Attributes:
        step: its place in the schedule that was announced; -1: none.
        steps: the schedule; held, so that its id is not used again.
        tables: what values depend on -> the tensors in that, held likewise, and every holder's values at each step.
    """

    def __init__(self) -> None:
        self.step = -1
        self.steps: torch.Tensor | None = None
        self.tables: dict[tuple[Any, ...], tuple[Any, list[dict[nn.Module, torch.Tensor]]]] = {}


class Hoist:
    """Watches one pipeline's scheduler and transformer; see `ditq_runtime.speed.prepare`.

    Where in the schedule a forward stands must be known without waiting for a device. Pipelines ask the scheduler to
    scale the model's input right before the model is called, or give the model an element of the schedule, or
    note which one they are at. A forward that says nothing of that, or whose timestep is none of the
    scheduler's, or differs from it, computes its modulation as ever; so does one whose weights still wait on another
    device, as offloading moves them after this, and one with an adapter in its modulation: it may be switched between
    steps, and a `scale` is known inside of the forward only. Only what a pipeline notes (Flux) is believed on a GPU.

    Attributes:
        tables: how often modulation was computed for a whole schedule.
        hits: forwards that used it.
        holders: the modules it computes for.
        scheduler: the one it watches.
    """

    def __init__(self, pipe: Any, hoistable: Hoistable) -> None:
        """Install."""
        self.tables, self.hits = 0, 0
        model, scheduler = pipe.transformer, pipe.scheduler
        self._noted = lambda: getattr(
            pipe, NOTED, None
        )  # a copy of the model takes no pipeline along
        self._model, self.scheduler, self._run = model, scheduler, _Run()
        self._hoistable, self.holders = hoistable, hoistable.holders(model)
        setattr(model, HOISTS, [*getattr(model, HOISTS, ()), self])
        self._scale = getattr(scheduler, SCALE, None)
        if self._scale is not None:
            setattr(scheduler, SCALE, self._announced)
        self._adapters, self._adapted, self._loads = -1, False, 0
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
            model.register_load_state_dict_post_hook(self._loaded),
        ]

    def remove(self) -> None:
        """Uninstall; every forward computes its modulation again."""
        if self._scale is not None:
            delattr(self.scheduler, SCALE)
        for hook in self._hooks:
            hook.remove()
        getattr(self._model, HOISTS).remove(self)

    def _announced(self, sample: torch.Tensor, timestep: Any = None, *args: Any, **kw: Any) -> Any:
        self._run.step = _position(self.scheduler.timesteps, timestep)
        scaled: Any = self._scale
        return scaled(sample, timestep, *args, **kw)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep, conditions = kwargs.get("timestep"), self._hoistable.conditions(kwargs)
        steps, step = self.scheduler.timesteps, self._step_of(timestep)
        if step < 0 or timestep is None or conditions is None or self.has_adapter():
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        if timestep.device.type == "cpu" and not bool(
            (timestep == self._told(timestep)[step]).all()
        ):
            return
        run = self._run
        if run.steps is not steps:
            run.steps, run.tables = steps, {}
        contents = tuple((id(c), 0 if c.is_inference() else c._version) for c in conditions)
        batch = len(conditions[0] if conditions else hidden)
        key = (contents, batch, timestep.dtype, hidden.dtype, self._loads)
        found = run.tables.pop(key, None)
        if found is None:
            if _elsewhere(self.holders, hidden.device):
                return
            timesteps = self._told(timestep).repeat_interleave(batch)
            found = conditions, self._table(timesteps, conditions, hidden.dtype)
        run.tables[key] = found
        if len(run.tables) > KEPT:
            del run.tables[next(iter(run.tables))]
        here().hoisted = found[1][step]
        self.hits += 1

    def has_adapter(self) -> bool:
        """One is in a holder or outside of the blocks; looked for while there is one, and where some were made."""
        made = adapters_made()
        if self._adapted or made != self._adapters:
            others = (m for m in self._model.children() if not isinstance(m, nn.ModuleList))
            parts = (m for part in (*self.holders, *others) for m in part.modules())
            self._adapted = any(hasattr(m, LAYER_NAMES) for m in parts)
            self._adapters = made
        return self._adapted

    def _loaded(self, *_: Any) -> None:
        """Other weights: what was computed holds no more."""
        self._loads += 1

    def _step_of(self, timestep: torch.Tensor | None) -> int:
        """Where in the schedule a forward with this timestep stands, as it was announced; -1: nobody said."""
        step, self._run.step = self._run.step, -1
        for said in (timestep, self._noted()):
            if step < 0 and isinstance(said, torch.Tensor):
                step = _place(self.scheduler.timesteps, said)
        return step

    def _told(self, timestep: torch.Tensor) -> torch.Tensor:
        """What the model is given at each step [S], in the dtype and on the device of one timestep."""
        return self._hoistable.argument(self.scheduler.timesteps.to(timestep))

    def _table(
        self, timesteps: torch.Tensor, conditions: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> list[dict[nn.Module, torch.Tensor]]:
        """Of each step, the values of every holder; timesteps [S * B], steps one after another."""
        count = len(self.scheduler.timesteps)
        rows = tuple(c.repeat(count, *[1] * (c.dim() - 1)) for c in conditions)
        with torch.no_grad():
            values = self._hoistable.compute(self._model, timesteps, rows, dtype)
        here().index = None  # of all steps
        self.tables += 1
        return _by_step(self.holders, values, count)

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        here().hoisted = None


class HoistedRows(dict[nn.Module, torch.Tensor]):
    """Module -> modulation [B, N] of one step, all in one memory, which a CUDA graph copies at once.

    Attributes:
        memory: one row of numbers.
        key: what `places_of` says of it.
    """

    def __init__(self, holders: list[nn.Module], widths: list[int], memory: torch.Tensor) -> None:
        """Holders share a memory in order; widths are N."""
        self._widths, self.memory = widths, memory
        batch = len(memory) // sum(widths)
        parts = memory.split([batch * width for width in widths])
        shaped = (part.view(batch, -1) for part in parts)
        super().__init__(zip(holders, shaped, strict=True))
        self.key = places_of(self)

    def on(self, memory: torch.Tensor) -> HoistedRows:
        """The same of another memory."""
        return HoistedRows(list(self), self._widths, memory)


def places_of(hoisted: dict[nn.Module, torch.Tensor]) -> tuple[Any, ...]:
    """Which modules hoisted modulation is for, and its shapes: what a CUDA graph depends on."""
    return *map(id, hoisted), *(value.shape for value in hoisted.values())


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
    place = _place(steps, timestep) if isinstance(timestep, torch.Tensor) else -1
    if place >= 0:
        return place
    found = (steps == timestep).nonzero()
    return int(found[0]) if len(found) else -1


def _place(steps: torch.Tensor, timestep: torch.Tensor) -> int:
    """Which element of a schedule [S] a tensor is, as in `for t in steps`, by its memory: no device is asked."""
    if not steps.is_contiguous() or any(timestep.stride()):  # one element, or expanded
        return -1
    memory = [t.untyped_storage().data_ptr() for t in (timestep, steps)]
    return int(timestep.storage_offset() - steps.storage_offset()) if memory[0] == memory[1] else -1

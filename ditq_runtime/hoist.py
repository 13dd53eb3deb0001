"""Modulation computed once for all steps: AdaLN's shift, scale and gate depend on timestep and class alone.

A third of a DiT's weights is modulation, read at every step for a handful of rows. Hoisted, they are read once per
sampling run, for all its steps together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditq_runtime.families.adaln import HOISTED, HoistedModulation, find_group


class Hoist:
    """Watches one pipeline's scheduler and transformer; see `ditq_runtime.prepare`.

    The scheduler is asked to scale the model's input right before the model is called: its timestep is known on the
    host there, and no device has to be waited for. A forward whose timestep was not announced so, is none of the
    scheduler's, or differs from it, computes its modulation as ever.

    Attributes:
        tables: how often modulation was computed for a whole schedule.
        hits: forwards that used it.
    """

    def __init__(self, model: Any, scheduler: Any, block_names: list[str]) -> None:
        """Install."""
        self.tables, self.hits = 0, 0
        self._scheduler, self._step = scheduler, -1
        self._blocks = [model.get_submodule(name) for name in block_names]
        self._key: tuple[Any, ...] = ()
        self._held: tuple[Any, ...] = ()
        self._values: list[torch.Tensor] = []
        for block in self._blocks:
            setattr(block, HOISTED, HoistedModulation())
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
        for block in self._blocks:
            delattr(block, HOISTED)

    def _announced(self, sample: torch.Tensor, timestep: Any = None, *args: Any, **kw: Any) -> Any:
        found = (
            self._scheduler.timesteps == timestep
        ).nonzero()  # on the host: schedulers keep them there
        self._step = int(found[0]) if len(found) else -1
        return self._scale(sample, timestep, *args, **kw)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step, self._step = self._step, -1
        timestep, labels = kwargs.get("timestep"), kwargs.get("class_labels")
        if step < 0 or timestep is None or labels is None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        steps = self._scheduler.timesteps
        if timestep.device.type == "cpu" and not bool((timestep == steps[step]).all()):
            return
        version = 0 if labels.is_inference() else labels._version
        key = (id(labels), version, id(steps), timestep.dtype, hidden.dtype)
        if key != self._key:
            self._values = self._compute(steps.to(timestep), labels, hidden.dtype)
            self._key, self._held = key, (labels, steps)  # held, so that an id is not used again
            self.tables += 1
        rows = slice(step * len(labels), (step + 1) * len(labels))
        for block, values in zip(self._blocks, self._values, strict=True):
            getattr(block, HOISTED).value = values[rows]
        self.hits += 1

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for block in self._blocks:
            getattr(block, HOISTED).value = None

    @torch.no_grad()
    def _compute(
        self, steps: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Every block's modulation [S * B, N] fp32 of all steps, step by step, sample by sample."""
        timesteps = steps.repeat_interleave(len(labels))
        classes = labels.repeat(len(steps))
        values = []
        for block in self._blocks:
            find_group(block, timesteps)
            norm: Any = block.norm1
            embedding = norm.emb(timesteps, classes, hidden_dtype=dtype)
            values.append(norm.linear(norm.silu(embedding)))
        return values

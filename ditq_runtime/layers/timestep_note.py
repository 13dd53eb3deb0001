"""The timestep of the current forward, for blocks that are only given an embedding of it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ditq_runtime.families.adaln import TIMESTEP_NOTE


class TimestepNote:
    """Where a model's forward leaves its `timestep` argument. A plain object: it has no state to save.

    Attributes:
        value: [B] or one value for all samples.
        position: of `timestep` among the positional arguments of the model's forward.
    """

    value: torch.Tensor

    def __init__(self, position: int) -> None:
        """Nothing noted yet."""
        self.position = position


def install_note(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Note the timestep of every forward of `model` where `blocks` look for it."""
    names = list(inspect.signature(type(model).forward).parameters)
    note = TimestepNote(names.index("timestep") - 1)  # the first is self
    for module in (model, *blocks):
        setattr(module, TIMESTEP_NOTE, note)
    model.register_forward_pre_hook(_take_note, with_kwargs=True)


def _take_note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    note = getattr(model, TIMESTEP_NOTE)  # not a closure: a deep copy of the model has its own
    note.value = kwargs["timestep"] if "timestep" in kwargs else args[note.position]

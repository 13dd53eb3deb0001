"""A float model beside a copy whose finished linears compute as the packed ones will, at the same calls.

What a linear reads in both is what rounding needs to make its output that of the float model in spite of what was
quantized before it. The model is run from its arguments up to a block and no further; the arguments of that block are
kept, and for each of its linears the block alone is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.transformer_calls import TransformerCall, map_tensors

MOST_ROWS = 8192  # rows of a linear's input that are kept, evenly over calls and tokens
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Rows:
    """Inputs of a linear, row by row the same tokens in both models.

    Attributes:
        wanted: [R, K] fp64, the float model's.
        seen: [R, K] fp64, its copy's.
        half: [R] bool, those of every second sample: two halves that share no sample where calls hold several.
    """

    wanted: torch.Tensor
    seen: torch.Tensor
    half: torch.Tensor


class Reached(Exception):
    """The place that a run was for has been reached."""


class Prefix:
    """Two models at the same calls.

    Attributes:
        wanted: the float model.
        seen: its copy, in which finished linears are exchanged.
    """

    def __init__(self, model: nn.Module, calls: Iterable[TransformerCall]) -> None:
        """Copy the model and keep the calls.

        Raises:
            ValueError: there is no call.
        """
        self.wanted, self.seen = model, deepcopy(model)
        self._calls = list(calls)
        self._block = ""
        self._arguments: dict[bool, list[Arguments]] = {}
        if not self._calls:
            raise ValueError("convert: the statistics kept no calls to replay; calibrate again")

    def enter(self, block: str) -> None:
        """Run both models up to a block, and keep what it is given."""
        self._block = block
        self._arguments = {
            finished: [self._reach(model, call) for call in self._calls]
            for finished, model in ((False, self.wanted), (True, self.seen))
        }

    @torch.no_grad()
    def outputs(self, finished: bool) -> list[torch.Tensor]:
        """What the float model makes of every call, or the copy as far as it is finished."""
        model = self.seen if finished else self.wanted
        return [call.replay(model) for call in self._calls]

    def rows(self, linear: str) -> Rows:
        """What a linear of the block reads in the float model and in the copy."""
        (wanted, half), (seen, _) = (self._read(finished, linear) for finished in (False, True))
        return Rows(wanted, seen, half)

    def finish(self, name: str, module: nn.Module) -> None:
        """Exchange a linear of the copy, by its full name."""
        parent, _, leaf = name.rpartition(".")
        setattr(self.seen.get_submodule(parent), leaf, module)

    @torch.no_grad()
    def _reach(self, model: nn.Module, call: TransformerCall) -> Arguments:
        kept: list[Arguments] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append((args, kwargs))
            raise Reached

        with _until_reached(model.get_submodule(self._block), keep):
            call.replay(model)
        if not kept:
            raise ValueError(
                f"convert: {self._block} never ran in a recorded call; calibrate again"
            )
        return kept[0]

    @torch.no_grad()
    def _read(self, finished: bool, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.seen if finished else self.wanted
        block, read, half = (
            model.get_submodule(self._block),
            list[torch.Tensor](),
            list[torch.Tensor](),
        )

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            number = torch.arange(len(read), len(read) + len(x)) % 2  # of call plus sample
            read.append(x.reshape(-1, x.shape[-1]))
            half.append(number.bool().repeat_interleave(x[0].numel() // x.shape[-1]))
            raise Reached

        for arguments in self._arguments[finished]:
            args, kwargs = map_tensors(torch.clone, arguments)  # a block may write into them
            with _until_reached(block.get_submodule(linear), keep):
                block(*args, **kwargs)
        share = max(1, MOST_ROWS // len(read))
        rows, of = (torch.cat([_evenly(part, share) for part in parts]) for parts in (read, half))
        return rows.double().cpu(), of


@contextmanager
def _until_reached(module: nn.Module, hook: Any) -> Iterator[None]:
    """A pre-forward hook that ends the run inside."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    except Reached:
        pass
    finally:
        handle.remove()


def _evenly(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).round().long()]

"""A float model beside a copy whose finished linears compute as the packed ones will, at the same calls.

What a linear reads in both is what rounding needs to make its output that of the float model in spite of what was
quantized before it. Blocks are entered in the order in which they run. What the finished one made of every call is
kept, and the next is reached by a run in which the blocks before it are not computed: the last gives what was kept,
those before it NaN. So the work grows with the number of blocks and no more, and one block is in memory at a time
where the weights are on disk. Where a NaN arrives (a block reads more than its predecessor, as behind long skips) all
is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.transformer_calls import TransformerCall, map_tensors
from ditq_converters.hooks import until_reached
from ditq_converters.sites.trace import tensors_in
from ditq_converters.streaming.model import copy_of, drop_weights, lend_weights

MOST_ROWS = 8192  # rows of a linear's input that are kept, evenly over calls and tokens
SHARE = 4  # the arguments and outputs of a block take at most this part of a memory budget
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


class Prefix:
    """Two models at the same calls.

    Attributes:
        wanted: the float model.
        seen: its copy, in which finished linears are exchanged; both share the tensors that are float.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Iterable[TransformerCall],
        blocks: Sequence[str] = (),
        memory_budget: int | None = None,
    ) -> None:
        """Copy the model and keep the calls.

        Args:
            model: the float model, in memory or on disk.
            calls: to make; of more than fit into a part of the budget, some, evenly.
            blocks: names of its blocks in the order in which they run; others may be entered too.
            memory_budget: bytes of main memory; None: all calls are kept.

        Raises:
            ValueError: there is no call.
        """
        self.wanted, self.seen = model, copy_of(model)
        self._calls, self._blocks = list(calls), list(blocks)
        self._memory_budget, self._fitted = memory_budget, memory_budget is None
        self._block: str | None = None
        self._arguments: dict[bool, list[Arguments]] = {}
        self._made: dict[bool, list[Any]] = {}  # outputs of the block that was left last
        self._made_by: str | None = None
        self._shapes: dict[str, list[Any]] = {}  # block -> outputs in every call, without values
        if not self._calls:
            raise ValueError("convert: the statistics kept no calls to replay; calibrate again")

    def enter(self, block: str) -> None:
        """Run both models up to a block, and keep what it is given."""
        self.leave()
        self._block = block
        lend_weights(self.wanted, self.seen, block)
        if not self._fitted:
            self._fit()
        self._arguments = {
            finished: [self._reach(model, i, finished) for i in range(self.num_calls)]
            for finished, model in ((False, self.wanted), (True, self.seen))
        }
        self._made, self._made_by = {}, None

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
        place = next(p for p in self.seen.parameters() if not p.is_meta).device
        setattr(self.seen.get_submodule(parent), leaf, module.to(place))

    def leave(self) -> None:
        """Run the block in both, and keep what they make for the next; its arguments and float weights go."""
        if self._block is None:
            return
        for finished in (False, True):
            self._made[finished] = self.made(finished)
        self._shapes[self._block] = [map_tensors(_as_meta, made) for made in self._made[False]]
        self._made_by, self._block, self._arguments = self._block, None, {}
        drop_weights(self.seen, self._made_by)

    @torch.no_grad()
    def made(self, finished: bool) -> list[Any]:
        """What the block makes of every call, in the float model or in the copy as far as it is finished."""
        if finished not in self._made:
            made = [self.run(i, finished) for i in range(self.num_calls)]
            if finished:  # it changes with every linear that is finished
                return made
            self._made[finished] = made
        return self._made[finished]

    def run(self, call: int, finished: bool) -> Any:
        """The block's outputs in one call."""
        assert self._block is not None
        model = self.seen if finished else self.wanted
        args, kwargs = map_tensors(torch.clone, self._arguments[finished][call])
        return model.get_submodule(self._block)(*args, **kwargs)  # a block may write into them

    @property
    def num_calls(self) -> int:
        """How many calls are made."""
        return len(self._calls)

    def _fit(self) -> None:
        """Give calls up where the arguments and outputs of all would not fit."""
        one = self._reach(self.wanted, 0, False)
        each = 4 * _nbytes(one)  # what a block is given and what it makes, in both models
        most = (self._memory_budget or 0) // SHARE // max(each, 1)
        if self._memory_budget is not None and most < len(self._calls):
            self._calls = [self._calls[i] for i in evenly(len(self._calls), max(1, most))]
        self._fitted = True

    def _reach(self, model: nn.Module, call: int, finished: bool) -> Arguments:
        """What the block is given in one call."""
        assert self._block is not None
        known = self._known(call, finished)
        if known:
            found = self._arrive(model, call, known)
            if found is not None:
                return found
        found = self._arrive(model, call, {})
        if found is None:
            raise ValueError(
                f"convert: {self._block} never ran in a recorded call; calibrate again"
            )
        return found

    def _known(self, call: int, finished: bool) -> dict[str, Any]:
        """Block -> what stands for its outputs; nothing unless that of the block before is kept."""
        if self._made_by is None or self._block not in self._blocks:
            return {}
        before = self._blocks[: self._blocks.index(self._block)]
        if not before or before[-1] != self._made_by:
            return {}
        if any(name not in self._shapes for name in before):
            return {}
        known = {name: map_tensors(_unknown, self._shapes[name][call]) for name in before[:-1]}
        return known | {before[-1]: self._made[finished][call]}

    @torch.no_grad()
    def _arrive(self, model: nn.Module, call: int, known: dict[str, Any]) -> Arguments | None:
        """A run up to the block, in which others give what is known; None if it did not get there or met a NaN."""
        kept: list[Arguments] = []
        ran = dict.fromkeys(known, 0)

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append((args, kwargs))

        def give(name: str, *_: Any, **__: Any) -> Any:
            ran[name] += 1
            return known[name]

        assert self._block is not None
        with ExitStack() as stack:
            stack.enter_context(until_reached([model.get_submodule(self._block)], keep))
            for name in known:
                stack.enter_context(_instead(model.get_submodule(name), partial(give, name)))
            self._calls[call].replay(model)
        if not kept or (known and (any(n != 1 for n in ran.values()) or _has_nan(kept[0]))):
            return None
        return kept[0]

    @torch.no_grad()
    def _read(self, finished: bool, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Its inputs [R, K] fp64, and which belong to every second sample, [R] bool."""
        assert self._block is not None
        model = self.seen if finished else self.wanted
        place = model.get_submodule(f"{self._block}.{linear}")
        read, half = list[torch.Tensor](), list[torch.Tensor]()

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            number = torch.arange(len(read), len(read) + len(x)) % 2  # of call plus sample
            read.append(x.reshape(-1, x.shape[-1]))
            half.append(number.bool().repeat_interleave(x[0].numel() // x.shape[-1]))

        share = max(1, MOST_ROWS // self.num_calls)
        for call in range(self.num_calls):
            with until_reached([place], keep):
                self.run(call, finished)
            some = evenly(len(read[-1]), share)
            read[-1], half[-1] = read[-1][some], half[-1][some]
        return torch.cat(read).double().cpu(), torch.cat(half)


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a module."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _as_meta(tensor: torch.Tensor) -> torch.Tensor:
    """Its shape, dtype and device without its values."""
    return tensor.new_empty(1).expand(tensor.shape)


def _unknown(shape: torch.Tensor) -> torch.Tensor:
    """NaN of a shape: whatever is made of it shows that it was read. Integers cannot show it, so they are refused."""
    return torch.full_like(shape, torch.nan, memory_format=torch.contiguous_format)


def _has_nan(tree: Any) -> bool:
    return any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors_in(tree))


def _nbytes(tree: Any) -> int:
    return sum(t.nbytes for t in tensors_in(tree))


def evenly(length: int, most: int) -> list[int]:
    """At most so many places out of `length`, evenly spaced."""
    if length <= most:
        return list(range(length))
    return torch.linspace(0, length - 1, most).round().long().tolist()

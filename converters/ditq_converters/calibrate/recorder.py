"""Hooks that watch transformers: the range of every linear input, a few of its rows, Q, K and V, modulation, calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.errors import StatisticsError
from ditq_converters.calibrate.rows import Kept, RowChoice
from ditq_converters.calibrate.transformer_calls import TransformerCall, map_tensors, timestep_of
from ditq_converters.hooks import by_name
from ditq_converters.sites.operands import OperandWatch
from ditq_runtime.calls.seeds import splitmix64
from ditq_runtime.families import Family

Range = tuple[torch.Tensor, torch.Tensor]
REPLAY_STREAM = -3  # a counter that no row has


@dataclass
class Visit:
    """What neighbouring calls of one transformer at one timestep showed.

    Attributes:
        component: which transformer.
        timestep: that it was told.
        ranges: site, or operand of an attention -> (min [K], max [K]) fp32.
        rows: site -> its chosen rows.
        modulation: modulation linear -> the chosen rows of its input.
    """

    component: str
    timestep: float
    ranges: dict[str, Range] = field(default_factory=dict)
    rows: dict[str, Kept] = field(default_factory=dict)
    modulation: dict[str, Kept] = field(default_factory=dict)


class Recorder:
    """Watches the transformers of one input's run, and hands over every visit when it is over."""

    def __init__(
        self,
        models: dict[str, tuple[nn.Module, Family]],
        choice: RowChoice,
        replay: int,
        seed: int,
        attention: bool,
        done: Callable[[Visit], None],
    ) -> None:
        """Remember where to listen; nothing is hooked before `with`.

        Args:
            models: component -> transformer and its table.
            choice: which rows to keep.
            replay: how many calls to keep whole.
            seed: of their choice.
            attention: also listen to Q, K and V of every attention that can run quantized.
            done: told each visit, in the order of the run.
        """
        self._models, self._choice, self._replay, self._done = models, choice, replay, done
        self._seed, self._attention = seed, attention
        self._hooks = ExitStack()
        self._watches: dict[str, OperandWatch] = {}
        self._visit: Visit | None = None
        self.calls = 0
        self.kept: dict[int, tuple[int, TransformerCall]] = {}  # key -> number and call

    def __enter__(self) -> Recorder:
        """Install the hooks."""
        for component, (model, family) in self._models.items():
            begin = self._beginner(component, family.timestep_argument)
            self._hooks.enter_context(model.register_forward_pre_hook(begin, with_kwargs=True))
            for block, table in family.block_tables(model).items():
                for site in table.sites:
                    for reader in site.observed:
                        keeps = reader == site.observed[0]
                        hook = self._observer(f"{block}.{site.name}", keeps)
                        self._listen(model, f"{block}.{reader}", hook)
            for name in family.modulation_names(model):
                self._listen(model, name, self._modulation(name))
            self._watch_operands(component, model, family)
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def finish(self) -> list[TransformerCall]:
        """Hand over the last visit; the calls that were kept whole, in their order."""
        self._hand_over()
        return [call for _, call in sorted(self.kept.values(), key=lambda item: item[0])]

    def _listen(self, model: nn.Module, name: str, hook: Any) -> None:
        self._hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook))

    def _watch_operands(self, component: str, model: nn.Module, family: Family) -> None:
        names = family.attention_names(model) if self._attention else []
        if names:
            watch = OperandWatch(
                {name: model.get_submodule(name) for name in names},
                lambda operand, rows: self._observe(operand, rows.float()),
            )
            self._watches[component] = self._hooks.enter_context(watch)

    def _beginner(self, component: str, traced: str | None) -> Any:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            now = timestep_of(traced, by_name(module, args, kwargs))
            visit = self._visit
            if visit is None or (visit.component, visit.timestep) != (component, now):
                self._hand_over()
                self._visit = Visit(component, now)
            self._keep_call(TransformerCall(component, now, args, kwargs))
            self.calls += 1

        return begin

    def _keep_call(self, call: TransformerCall) -> None:
        key = splitmix64(self._seed, self._choice.given, self.calls, REPLAY_STREAM)
        if not self._replay or (len(self.kept) >= self._replay and key > max(self.kept)):
            return
        args, kwargs = map_tensors(lambda t: t.detach().cpu().clone(), (call.args, call.kwargs))
        self.kept[key] = self.calls, TransformerCall(call.component, call.timestep, args, kwargs)
        if len(self.kept) > self._replay:
            del self.kept[max(self.kept)]

    def _hand_over(self) -> None:
        if self._visit is None:
            return
        component = self._visit.component
        model, family = self._models[component]
        for name in family.attention_names(model) if self._attention else []:
            if (
                f"{name}.q" not in self._visit.ranges
                and name not in self._watches[component].unlike
            ):
                raise StatisticsError(
                    f"{name}: did not call scaled_dot_product_attention, where Q, K and V are recorded; set diffusers' "
                    "default processor and backend, or calibrate with --no-attention"
                )
        self._done(self._visit)
        self._visit = None

    def _observer(self, site: str, keeps: bool) -> Any:
        def observe(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            flat = args[0].detach().reshape(-1, args[0].shape[-1])
            if len(flat) and self._visit is not None:  # experts may get no tokens
                self._observe(site, flat.float())
                if keeps:
                    self._keep(self._visit.rows, site, flat)

        return observe

    def _modulation(self, name: str) -> Any:
        def observe(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if self._visit is not None:
                flat = args[0].detach().reshape(-1, args[0].shape[-1])
                self._keep(self._visit.modulation, name, flat)

        return observe

    def _observe(self, site: str, rows: torch.Tensor) -> None:
        if self._visit is None:
            return
        low, high = rows.amin(0).cpu(), rows.amax(0).cpu()
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise StatisticsError(
                f"{site}: the float model produced a value that is not finite; check its weights"
            )
        before = self._visit.ranges.get(site)
        if before is not None:
            low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
        self._visit.ranges[site] = (low, high)

    def _keep(self, kept: dict[str, Kept], name: str, flat: torch.Tensor) -> None:
        if not self._choice.count:
            return
        chosen = self._choice.of(flat, self.calls - 1)  # counted when it began
        before = kept.get(name)
        kept[name] = chosen if before is None else before.joined(chosen, self._choice.count)

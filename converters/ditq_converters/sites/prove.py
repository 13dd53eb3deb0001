"""Prove folds: with them and without them a twin computes the same, in fp64, up to rounding.

Every site with a producer gets random factors and shifts; the producer makes (x - z) / s, the readers take it back.
Then each site's input must be that, and the model's output must be as it was. A forgotten reader shows in the output,
wrong rows at the site, also where a path has no effect on the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ditq_converters.sites.folds import on_the_fly
from ditq_converters.sites.trace import Graph, run_wide
from ditq_runtime.families import (
    BlockTable,
    NormWeights,
    OnTheFly,
    Producer,
    Site,
    ValueRows,
    rows_of,
)

PROVEN = 1e-10  # relative; right folds err by some 1e-15, a forgotten reader by 1e-1
Tables = dict[str, BlockTable]


@dataclass(frozen=True)
class Fold:
    """One site with its producer, factors s [K] and shift z [K], both fp64."""

    block: str
    site: Site
    smooth: torch.Tensor
    shift: torch.Tensor


class Prover:
    """Tries folds on one twin."""

    def __init__(
        self, twin: nn.Module, inputs: dict[str, Any], graph: Graph, out: list[torch.Tensor]
    ) -> None:
        """Of a traced forward of `twin` on `inputs`, which gave `out`."""
        self.twin, self.inputs, self.graph, self.out = twin, inputs, graph, out

    def prove(self, proposed: Tables) -> tuple[Tables, float]:
        """The tables with producers that hold, and their error; where none does, the quantizer applies the transform.

        All are tried at once; if they fail together, each alone, with and without a shift.
        """
        error = self.error(proposed)
        if error <= PROVEN:
            return proposed, error
        proven = {
            block: replace(table, sites=tuple(self._alone(proposed, block, s) for s in table.sites))
            for block, table in proposed.items()
        }
        error = self.error(proven)
        if error > PROVEN:
            raise ValueError(
                "sites: folds that hold one by one do not hold together; report this model"
            )
        return proven, error

    def error(self, tables: Tables) -> float:
        """Largest relative error of the output and of the folded sites' inputs, with all folds of these tables."""
        folds = [
            self._drawn(block, site)
            for block, table in tables.items()
            for site in table.sites
            if not isinstance(site.producer, OnTheFly)
        ]
        if not folds:
            return 0.0
        read: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            for fold in folds:
                stack.enter_context(self._folded(fold))
                for name in fold.site.observed:
                    stack.enter_context(_watched(self.twin, f"{fold.block}.{name}", read))
            out = run_wide(self.twin, self.inputs)
        errors = [_relative(ours, theirs) for ours, theirs in zip(out, self.out, strict=True)]
        for fold in folds:
            for name in fold.site.observed:
                expected = (self._input(f"{fold.block}.{name}") - fold.shift) / fold.smooth
                errors.append(_relative(read[f"{fold.block}.{name}"], expected))
        return max(errors)

    def _alone(self, tables: Tables, block: str, site: Site) -> Site:
        """A site with the strongest producer that holds by itself."""
        for producer in _weaker(site.producer):
            candidate = replace(site, producer=producer)
            if self.error({block: BlockTable((candidate,))}) <= PROVEN:
                return candidate
        return replace(site, producer=on_the_fly(self.graph, block, site))

    def _drawn(self, block: str, site: Site) -> Fold:
        """Random factors in [0.5, 2] and shifts, 1 and 0 where the producer takes none."""
        width = self._linear(f"{block}.{site.consumers[0]}").in_features
        generator = torch.Generator().manual_seed(len(site.name))
        smooth = 0.5 + 1.5 * torch.rand(width, generator=generator, dtype=torch.float64)
        shift = torch.randn(width, generator=generator, dtype=torch.float64)
        producer = site.producer
        if not getattr(producer, "takes_shift", False):
            shift.zero_()
        if isinstance(producer, ValueRows):
            beyond = self._linear(f"{block}.{producer.values[0]}").out_features
            smooth[beyond:], shift[beyond:] = 1, 0
        return Fold(block, site, smooth, shift)

    @contextmanager
    def _folded(self, fold: Fold) -> Iterator[None]:
        """Inside, the twin has this fold."""
        with ExitStack() as stack:
            for name in fold.site.consumers:
                linear = self._linear(f"{fold.block}.{name}")
                back = linear.weight @ fold.shift
                stack.enter_context(_changed(linear, "weight", linear.weight * fold.smooth))
                stack.enter_context(_changed(linear, "bias", _bias(linear) + back))
            for module, rows, smooth, shift in self._makers(fold):
                factor = torch.ones(len(module.weight), dtype=torch.float64)
                term = torch.zeros_like(factor)
                factor[rows], term[rows] = 1 / smooth, -shift
                weight = module.weight * factor.reshape(-1, *[1] * (module.weight.dim() - 1))
                stack.enter_context(_changed(module, "weight", weight))
                if bool(term.any()) or getattr(module, "bias", None) is not None:
                    stack.enter_context(_changed(module, "bias", (_bias(module) + term) * factor))
            yield

    def _makers(self, fold: Fold) -> list[tuple[Any, slice, torch.Tensor, torch.Tensor]]:
        """Modules that the transform goes into: which entries, factors, shifts."""
        found = []
        for made in rows_of(fold.site.producer, len(fold.smooth)):
            module: Any = self.twin.get_submodule(f"{fold.block}.{made.owner}")
            width = min(len(fold.smooth), len(module.weight) - made.start)
            rows = slice(made.start, made.start + width)
            found.append((module, rows, fold.smooth[:width], fold.shift[:width]))
        return found

    def _input(self, linear: str) -> torch.Tensor:
        return self.graph.values[self.graph.calls[linear][0].get("input")].tensor

    def _linear(self, name: str) -> nn.Linear:
        found = self.twin.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found


def _weaker(producer: Producer) -> list[Producer]:
    """A producer, then the same without a shift."""
    if isinstance(producer, OnTheFly):
        return []
    if isinstance(producer, ValueRows | NormWeights) and producer.takes_shift:
        return [producer, replace(producer, takes_shift=False)]
    return [producer]


@contextmanager
def _changed(module: nn.Module, name: str, tensor: torch.Tensor) -> Iterator[None]:
    """Inside, a parameter of a module is another."""
    before = getattr(module, name)
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    try:
        yield
    finally:
        setattr(module, name, before)


def _watched(model: nn.Module, name: str, read: dict[str, torch.Tensor]) -> RemovableHandle:
    """Inside, what a linear reads is kept under its name."""

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        read[name] = args[0].clone()

    return model.get_submodule(name).register_forward_pre_hook(keep)


def _bias(module: Any) -> torch.Tensor:
    if module.bias is not None:
        return module.bias
    return torch.zeros(len(module.weight), dtype=module.weight.dtype)


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value; infinite where one is not finite."""
    if ours.shape != theirs.shape or not bool(torch.isfinite(ours).all()):
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-300))

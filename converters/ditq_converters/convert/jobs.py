"""What there is to convert: each transformer of a pipeline, with its plan and its statistics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.known_sites import know_sites
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.block import (
    PackedBlock,
    convert_block,
    convert_final_modulation,
    play_block,
)
from ditq_converters.convert.classes import ask_all_classes
from ditq_converters.convert.pack import make_scheme
from ditq_converters.convert.prefix import Prefix, evenly
from ditq_converters.convert.reconstruct import Tell
from ditq_converters.methods import METHODS
from ditq_converters.models.gate import float_transformer
from ditq_converters.plan.attention import BY_CHOICE
from ditq_converters.plan.check import check_plan, check_statistics, differing_schedules
from ditq_converters.plan.compact import compact, headline
from ditq_converters.plan.make import plan_of
from ditq_converters.plan.plan import Plan
from ditq_converters.plan.recipe import Recipe
from ditq_converters.plan.sizes import larger_than_eight_bits
from ditq_converters.progress import Log, note
from ditq_converters.sites import family_or_row
from ditq_converters.streaming.model import streamed_of, weights_of
from ditq_runtime.calls.parts import transformers_in
from ditq_runtime.families import Family
from ditq_runtime.families.placing import Shapes
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.version import __version__

AIMED_CALLS = (
    8  # of those kept, evenly: aimed rounding runs the model on them, and is no better on 16
)


@dataclass(frozen=True)
class Job:
    """One conversion.

    Attributes:
        pipe: what was opened.
        model: one of its transformers.
        family: of the transformer.
        plan: what happens to it.
        stats: of it; None: the plan needs none.
        quiet: show no progress bar.
        before: the model as far as it is packed, where rounding is aimed.
        component: the transformer's name in the pipeline.
    """

    pipe: Any
    model: nn.Module
    family: Family
    plan: Plan
    stats: CalibrationStats | None
    quiet: bool
    before: Prefix | None = None
    component: str = "transformer"

    @torch.no_grad()
    def convert_part(self, name: str, log: Log | None = None) -> PackedBlock:
        """A block, or the final modulation."""
        part = self.plan.part(name)
        used = self.stats if self.plan.needs_statistics else None
        if name == self.family.final_modulation:
            return convert_final_modulation(self.model, name, part, used)
        tell = None if log is None else learning(log, name)
        with weights_of(self.model, name):
            return convert_block(self.model, self.family, name, part, used, self.before, tell)

    def take_up(self, name: str, packed: PackedBlock) -> None:
        """Let the parts that follow see one that an earlier run converted."""
        if self.before is None or name == self.family.final_modulation:
            return
        part = self.plan.part(name)
        with weights_of(self.model, name):
            play_block(self.model, self.family, name, part, self.stats, self.before, packed)

    def scheme(self, formats: dict[str, LayerFormat], shapes: Shapes) -> Scheme:
        """Of the packed model: full layer name -> format, stored tensor -> shape."""
        attention = {a.name: a.format for a in self.plan.attention if a.format is not None}
        return make_scheme(self.model, self.family, formats, shapes, attention)

    @property
    def provenance(self) -> dict[str, Any]:
        """What `config.json` keeps of how the checkpoint was made; `ditq/plan.json` beside it has the reasons."""
        methods = dict.fromkeys(site.method for site in self.plan.sites)
        made: dict[str, Any] = {
            **headline(self.plan),
            "source": "; ".join(METHODS[method].source for method in methods),
            "ditq": __version__,
            "plan": compact(self.plan),
        }
        if self.stats is not None:
            made["calibration"] = self.stats.provenance
        return made


def jobs_of(
    pipe: Any,
    given: Plan | Recipe | Mapping[str, Plan],
    stats: CalibrationStats | None,
    inputs: dict[str, Any] | None,
    quiet: bool,
) -> list[Job]:
    """A conversion for each transformer that a plan is for; tells of those that stay float."""
    jobs: list[Job] = []
    for component, model in transformers_in(pipe).items():
        float_transformer(model, "convert")
        own = stats if stats is None or pipe is model else stats.of(component)
        know_sites(model, own)
        try:
            plan, family = checked_plan(given, component, model, inputs, quiet)
        except ValueError as error:
            if not jobs or isinstance(given, Recipe):  # the first is what a plan is for
                raise
            note(f"{component}: stays float ({error})", quiet)
            continue
        check_statistics(plan, own)
        told = differing_schedules(plan, own)
        if told:
            note(f"{component}: {told}", quiet)
        jobs.append(Job(pipe, model, family, plan, own, quiet, component=component))
    return jobs


def checked_plan(
    given: Plan | Recipe | Mapping[str, Plan],
    component: str,
    model: nn.Module,
    inputs: dict[str, Any] | None,
    quiet: bool,
) -> tuple[Plan, Family]:
    """A plan for the model, and the family that it is carried out by; tells what a default leaves float."""
    if isinstance(given, Mapping):
        if component not in given:
            raise ValueError(f"no plan was given for it, but for {', '.join(given)}")
        given = given[component]
    plan = given if isinstance(given, Plan) else plan_of(model, given, inputs=inputs)
    family = family_or_row(model, inputs)
    check_plan(plan, model, family)
    larger = larger_than_eight_bits(plan, model)
    if larger:
        note(larger, quiet)
    left = [a for a in plan.attention if a.format is None and a.reason != BY_CHOICE]
    if left and not isinstance(given, Plan):
        note(f"{left[0].name}: its attention stays float: {left[0].reason}", quiet)
    return plan, family


def learning(log: Log, name: str) -> Tell:
    """What is called after every iteration of a block; it writes now and then."""
    begin = time.monotonic()

    def tell(step: int, total: int, error: float) -> None:
        if log.is_due or step == total:
            left = (time.monotonic() - begin) / step * (total - step)
            log.write(
                f"{name}: iteration {step} of {total}, error {error:.3f} of that before learning, "
                f"ETA of the block {left:.0f} s"
            )

    return tell


def prefix_of(job: Job) -> Prefix | None:
    """What rounding runs that reads what the packed model will show; None where none does."""
    if job.stats is None or not any(linear.runs_model for linear in job.plan.linears):
        return None
    streamed = streamed_of(job.model)
    budget = None if streamed is None else streamed.memory_budget
    calls = list(job.stats.replay())
    if not any(linear.rounding == "reconstruct" for linear in job.plan.linears):
        few = [calls[i] for i in evenly(len(calls), AIMED_CALLS)]
        calls = ask_all_classes(job.model, few)
    return Prefix(job.model, calls, job.family.block_names(job.model), budget)

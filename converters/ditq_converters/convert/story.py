"""Convert: from a float pipeline to a packed one. Reads in the order it runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.known_sites import know_sites
from ditq_converters.calibrate.stats import CalibrationStats, model_hash
from ditq_converters.convert.block import PackedBlock, convert_block, convert_final_modulation
from ditq_converters.convert.pack import make_scheme, pack_model, packed_skeleton
from ditq_converters.convert.prefix import Prefix
from ditq_converters.memory import give_back
from ditq_converters.methods import METHODS
from ditq_converters.models.gate import float_transformer
from ditq_converters.models.open import open_model
from ditq_converters.pipeline_folder import write_pipeline
from ditq_converters.plan.attention import BY_CHOICE
from ditq_converters.plan.check import check_plan, check_statistics
from ditq_converters.plan.compact import compact, headline
from ditq_converters.plan.file import to_json
from ditq_converters.plan.make import plan_of
from ditq_converters.plan.plan import Plan
from ditq_converters.plan.recipe import Recipe
from ditq_converters.progress import note, progress_bar
from ditq_converters.sites import family_or_row
from ditq_converters.streaming.finished import FinishedBlocks
from ditq_converters.streaming.model import streamed_of, tensors_of, weights_of
from ditq_converters.streaming.write import check_room, write_streamed
from ditq_runtime.families import Family
from ditq_runtime.families.placing import Shapes
from ditq_runtime.files import check_new
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.surroundings import steady


@steady()
def convert(
    pipe: Any,
    plan: Plan | Recipe,
    stats: CalibrationStats | None = None,
    out: str | Path | None = None,
    max_shard_size: str = "10GB",
    quiet: bool = False,
    *,
    memory_budget: int | None = None,
    inputs: dict[str, Any] | None = None,
) -> nn.Module:
    """Turn a float model into a packed checkpoint.

    Args:
        pipe: a diffusers pipeline, or its transformer alone, not changed; or a MODEL that `open_model` opens.
        plan: what happens to every linear (`make_plan`, `read_plan`); or the choices that make one.
        stats: a calibration of this very model; needed by static activations and by methods that smooth.
        out: folder to write, a pipeline or a transformer as `pipe` is; it appears complete or not at all.
        max_shard_size: as in diffusers' `save_pretrained`.
        quiet: show no progress bar.
        memory_budget: bytes of main memory for a MODEL: one that is larger is read and converted block by block, into
            the same bytes. Finished blocks stay in the hidden folder `.OUT.blocks` until `out` is complete: killed,
            the same call goes on after them.
        inputs: keyword arguments of one forward of the transformer, as the plan was made with; statistics know its
            sites themselves.

    Returns:
        The packed transformer, in memory; its tensors on meta if it was converted block by block.

    Raises:
        ValueError: an unsupported model, a plan that is not for it, missing statistics, a tensor that is not finite,
            a budget that one block does not fit into.
        StatisticsError: the statistics are of another model, incomplete or damaged.
        FileExistsError: `out` is in use.
    """
    if out is not None:
        check_new(Path(out))
    pipe = opened(pipe, memory_budget)
    model = float_transformer(pipe, "convert")
    know_sites(model, stats)
    plan, family = checked_plan(plan, model, inputs, quiet)
    check_statistics(plan, stats)
    on_disk = streamed_of(model) is not None
    if on_disk:
        check_room(model, out)
    check_finite(model)
    if stats is not None:
        stats.check_model(model)
    job = Job(pipe, model, family, plan, stats, quiet, prefix_of(plan, model, stats))
    if on_disk:
        assert out is not None
        return convert_on_disk(job, Path(out), max_shard_size)
    packed = convert_in_memory(job)
    if out is not None:
        save(pipe, packed, to_json(plan), Path(out), max_shard_size)
    return packed


def opened(pipe: Any, memory_budget: int | None) -> Any:
    """What is loaded already, or the model of that name."""
    if isinstance(pipe, str | Path):
        return open_model(str(pipe), memory_budget=memory_budget)
    if memory_budget is not None:
        raise ValueError(
            "convert: memory_budget is for a model on disk, this one is loaded; pass its folder"
        )
    return pipe


@dataclass(frozen=True)
class Job:
    """One conversion.

    Attributes:
        pipe: what was opened.
        model: its transformer.
        family: of the transformer.
        plan: what happens to it.
        stats: of it; None: the plan needs none.
        quiet: show no progress bar.
        before: the model as far as it is packed, where rounding is aimed.
    """

    pipe: Any
    model: nn.Module
    family: Family
    plan: Plan
    stats: CalibrationStats | None
    quiet: bool
    before: Prefix | None = None

    @torch.no_grad()
    def convert_part(self, name: str) -> PackedBlock:
        """A block, or the final modulation."""
        part = self.plan.part(name)
        used = self.stats if self.plan.needs_statistics else None
        if name == self.family.final_modulation:
            return convert_final_modulation(self.model, name, part, used)
        with weights_of(self.model, name):
            return convert_block(self.model, self.family, name, part, used, self.before)

    def scheme(self, formats: dict[str, LayerFormat], shapes: Shapes) -> Scheme:
        """Of the packed model: full layer name -> format, stored tensor -> shape."""
        attention = {a.name: a.format for a in self.plan.attention if a.format is not None}
        return make_scheme(self.model, self.family, formats, shapes, attention)

    @property
    def provenance(self) -> dict[str, Any]:
        """What `config.json` keeps of how the checkpoint was made."""
        return provenance(self.plan, self.stats)


def convert_in_memory(job: Job) -> nn.Module:
    """Convert all parts and assemble the packed transformer."""
    tensors: dict[str, torch.Tensor] = {}
    formats: dict[str, LayerFormat] = {}
    parts = job.family.part_names(job.model)
    with progress_bar("converting", len(parts), quiet=job.quiet) as advance:
        for name in parts:
            packed_part = job.convert_part(name)
            tensors |= packed_part.tensors
            formats |= packed_part.formats
            advance()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    scheme = job.scheme(formats, shapes)
    return pack_model(job.model, scheme, tensors, job.provenance, job.plan.kept_dtype)


def convert_on_disk(job: Job, out: Path, max_shard_size: str) -> nn.Module:
    """Convert the parts that an earlier run did not, one in memory at a time, then write the folder from disk."""
    parts, made = job.family.part_names(job.model), job.provenance
    done = FinishedBlocks.open(out, {**made, "model_hash": model_hash(job.model)})
    earlier = done.names()
    with progress_bar("converting", len(parts), len(earlier), job.quiet) as advance:
        for name in parts:
            if name not in earlier:
                packed_part = job.convert_part(name)
                done.save(name, packed_part.tensors, packed_part.formats)
                del packed_part
                give_back()
                advance()
    scheme = job.scheme(done.formats(parts), done.shapes())
    packed = packed_skeleton(job.model, scheme, made, job.plan.kept_dtype)
    write_streamed(job.pipe, job.model, packed, to_json(job.plan), done, out, max_shard_size)
    return packed


def prefix_of(plan: Plan, model: nn.Module, stats: CalibrationStats | None) -> Prefix | None:
    """What rounding that is aimed runs; None where nothing is.

    Raises:
        ValueError: the model is on disk, so it cannot be run beside itself.
    """
    if stats is None or not any(linear.rounding == "aimed" for linear in plan.linears):
        return None
    if streamed_of(model) is not None:
        raise ValueError(
            "convert: rounding aimed runs the model, and this one is read block by block; take rounding gptq, or "
            "convert without --memory-budget"
        )
    return Prefix(model, stats.replay())


def checked_plan(
    given: Plan | Recipe, model: nn.Module, inputs: dict[str, Any] | None, quiet: bool
) -> tuple[Plan, Family]:
    """A plan for the model, and the family that it is carried out by; tells what a default leaves float."""
    plan = given if isinstance(given, Plan) else plan_of(model, given, inputs=inputs)
    family = family_or_row(model, inputs)
    check_plan(plan, model, family)
    left = [a for a in plan.attention if a.format is None and a.reason != BY_CHOICE]
    if left and not isinstance(given, Plan):
        note(f"{left[0].name}: its attention stays float: {left[0].reason}", quiet)
    return plan, family


def check_finite(model: nn.Module) -> None:
    """ValueError that names the first tensor of a float model with a NaN or an infinity."""
    for name, tensor in tensors_of(model):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        extremes = torch.stack(tensor.aminmax())  # a NaN comes through; one pass over the weights
        if not bool(torch.isfinite(extremes).all()):
            raise ValueError(
                f"{name}: holds a value that is not finite; check the source checkpoint"
            )


def provenance(plan: Plan, stats: CalibrationStats | None) -> dict[str, Any]:
    """What `config.json` keeps of how the checkpoint was made; `ditq/plan.json` beside it has the reasons."""
    methods = dict.fromkeys(site.method for site in plan.sites)
    made: dict[str, Any] = {
        **headline(plan),
        "source": "; ".join(METHODS[method].source for method in methods),
        "ditq": ditq_version(),
        "plan": compact(plan),
    }
    if stats is not None:
        made["calibration"] = stats.provenance
    return made


def ditq_version() -> str:
    """Version of the installed distribution; "source" when run from a source tree."""
    try:
        return version("ditq")
    except PackageNotFoundError:
        return "source"


def save(pipe: Any, packed: Any, plan: str, out: Path, max_shard_size: str) -> None:
    """Write the packed transformer, inside a copy of its pipeline where there is one, atomically."""
    if isinstance(pipe, nn.Module):
        write_pipeline(packed, out, max_shard_size, plan=plan)
        return
    components = {**pipe.components, "transformer": packed}
    write_pipeline(type(pipe)(**components), out, max_shard_size, labels_of=pipe, plan=plan)

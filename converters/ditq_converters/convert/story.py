"""Convert: from a float pipeline to a packed one. Reads in the order it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.stats import CalibrationStats, model_hash
from ditq_converters.convert.block import PackedBlock
from ditq_converters.convert.given import check_given
from ditq_converters.convert.jobs import Job, jobs_of, prefix_of
from ditq_converters.convert.pack import pack_model, packed_skeleton
from ditq_converters.memory import give_back
from ditq_converters.models.gate import float_transformer
from ditq_converters.models.open import open_model
from ditq_converters.pipeline_folder import write_pipeline
from ditq_converters.plan.file import to_json
from ditq_converters.plan.plan import Plan
from ditq_converters.plan.recipe import Recipe
from ditq_converters.progress import Log, progress_bar
from ditq_converters.streaming.finished import FinishedBlocks, forget
from ditq_converters.streaming.model import streamed_of, tensors_of
from ditq_converters.streaming.write import Piece, check_room, write_streamed
from ditq_runtime.calls.pipeline import with_transformers
from ditq_runtime.files import check_new, one_writer
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.surroundings import steady

LOG = "convert.log"


@steady()
def convert(
    pipe: Any,
    plan: Plan | Recipe | Mapping[str, Plan],
    stats: CalibrationStats | None = None,
    out: str | Path | None = None,
    max_shard_size: str = "10GB",
    quiet: bool = False,
    *,
    memory_budget: int | None = None,
    inputs: dict[str, Any] | None = None,
) -> Any:
    """Turn a float model into a packed checkpoint.

    Every transformer of a pipeline is converted: one plan serves all that have the same layers (Wan 2.2 has two), and
    a mapping gives each its own. One that no plan fits stays float, and a line says so.

    Args:
        pipe: a diffusers pipeline, or its transformer alone, not changed; or a MODEL that `open_model` opens.
        plan: what happens to every linear (`make_plan`, `read_plan`); or the choices that make one; or component ->
            its plan.
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
        The packed transformer, in memory, an `nn.Module`; its tensors on meta if it was converted block by block. Of
        a pipeline with several, component -> packed transformer.

    Raises:
        ValueError: an unsupported model, a plan that is not for it, missing statistics, a tensor that is not finite,
            a budget that one block does not fit into.
        StatisticsError: the statistics are of another model, incomplete or damaged.
        FileExistsError: `out` is in use.
    """
    check_given(plan, stats, out, max_shard_size)
    target = None if out is None else Path(out)
    if target is not None:
        check_new(target)
    with one_writer(target, again=True):
        return _convert(pipe, plan, stats, target, max_shard_size, quiet, memory_budget, inputs)


def _convert(
    pipe: Any,
    plan: Any,
    stats: CalibrationStats | None,
    out: Path | None,
    max_shard_size: str,
    quiet: bool,
    memory_budget: int | None,
    inputs: dict[str, Any] | None,
) -> Any:
    """`convert`, where nobody else writes `out`."""
    pipe = opened(pipe, memory_budget)
    float_transformer(pipe, "convert")
    jobs = jobs_of(pipe, plan, stats, inputs, quiet)
    on_disk = any(streamed_of(job.model) is not None for job in jobs)
    for job in jobs:
        if on_disk:
            check_room(job.model, out)
        check_finite(job.model)
        if job.stats is not None:
            job.stats.check_model(job.model)
    jobs = [replace(job, before=prefix_of(job)) for job in jobs]
    if on_disk:
        assert out is not None
        packed = convert_on_disk(jobs, out, max_shard_size)
    else:
        packed = {job.component: convert_in_memory(job, out) for job in jobs}
        if out is not None:
            plans = {job.component: to_json(job.plan) for job in jobs}
            write_pipeline(assembled(pipe, packed), out, max_shard_size, plans)
            forget(out)
    return packed if len(packed) > 1 else next(iter(packed.values()))


def opened(pipe: Any, memory_budget: int | None) -> Any:
    """What is loaded already, or the model of that name."""
    if isinstance(pipe, str | Path):
        return open_model(str(pipe), memory_budget=memory_budget)
    if memory_budget is not None:
        raise ValueError(
            "convert: memory_budget is for a model on disk, this one is loaded; pass its folder"
        )
    return pipe


def convert_in_memory(job: Job, out: Path | None = None) -> nn.Module:
    """Convert all parts and assemble the packed transformer; parts of long work stay beside `out` until it is there."""
    done = finished_blocks(job, out) if out is not None and learns(job.plan) else None
    tensors: dict[str, torch.Tensor] = {}
    formats: dict[str, LayerFormat] = {}
    for packed_part in convert_parts(job, done):
        tensors |= packed_part.tensors
        formats |= packed_part.formats
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    scheme = job.scheme(formats, shapes)
    return pack_model(job.model, scheme, tensors, job.provenance, job.plan.kept_dtype)


def convert_on_disk(jobs: list[Job], out: Path, max_shard_size: str) -> dict[str, nn.Module]:
    """Convert the parts that an earlier run did not, one in memory at a time, then write the folder from disk."""
    pieces = {job.component: convert_in_pieces(job, out) for job in jobs}
    write_streamed(jobs[0].pipe, pieces, out, max_shard_size)
    return {component: piece.packed for component, piece in pieces.items()}


def convert_in_pieces(job: Job, out: Path) -> Piece:
    """The converted blocks of one transformer, on disk."""
    done = finished_blocks(job, out)
    for packed_part in convert_parts(job, done):
        del packed_part
        give_back()
    scheme = job.scheme(done.formats(job.family.part_names(job.model)), done.shapes())
    packed = packed_skeleton(job.model, scheme, job.provenance, job.plan.kept_dtype)
    return Piece(job.model, packed, to_json(job.plan), done)


def finished_blocks(job: Job, out: Path) -> FinishedBlocks:
    """The parts that an earlier run of this very conversion left."""
    made = {**job.provenance, "model_hash": model_hash(job.model)}
    return FinishedBlocks.open(out, job.component, made)


def convert_parts(job: Job, done: FinishedBlocks | None) -> Iterator[PackedBlock]:
    """All parts in their order; those of an earlier run are read, the others converted and kept."""
    parts = job.family.part_names(job.model)
    earlier = done.names() if done is not None else set()
    log = None if done is None else Log(done.folder / LOG, len(parts), len(earlier))
    with progress_bar("converting", len(parts), len(earlier), job.quiet) as advance:
        for name in parts:
            if done is not None and name in earlier:
                packed = PackedBlock(done.load(name), done.formats([name]))
                job.take_up(name, packed)
                yield packed
                continue
            packed = job.convert_part(name, log)
            if done is not None:
                done.save(name, packed.tensors, packed.formats)
            if log is not None:
                log.finished(f"{name} done")
            advance()
            yield packed


def learns(plan: Plan) -> bool:
    """Whether a conversion is long work, of which a kill must not cost more than a block."""
    return any(linear.rounding == "reconstruct" for linear in plan.linears)


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


def assembled(pipe: Any, packed: dict[str, nn.Module]) -> Any:
    """What is saved: the packed transformer, or a copy of its pipeline around all of them."""
    return packed["transformer"] if isinstance(pipe, nn.Module) else with_transformers(pipe, packed)

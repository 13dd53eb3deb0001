"""Calibrate: run a float pipeline on its inputs and record what its linears read. Reads in the order it runs."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ditq_converters.calibrate.known_sites import sites_record
from ditq_converters.calibrate.memory import needs
from ditq_converters.calibrate.prompts_once import encoded_once
from ditq_converters.calibrate.recorder import Recorder
from ditq_converters.calibrate.rows import RowChoice
from ditq_converters.calibrate.share import (
    Models,
    check_place,
    claim_folder,
    make_shards,
    merge_shards,
)
from ditq_converters.calibrate.stats import CalibrationStats, model_hash
from ditq_converters.models.gate import float_transformer
from ditq_converters.sites import family_for
from ditq_converters.sites.first_call import first_call
from ditq_converters.sites.inputs import NoInputs
from ditq_runtime.calls.inputs import LABELS_PER_CALL, Given, Input, gather
from ditq_runtime.calls.parts import transformers_in
from ditq_runtime.calls.pipeline import draw, pipeline_of, ready
from ditq_runtime.calls.seeds import splitmix64
from ditq_runtime.families import Family, family_of, get_linear
from ditq_runtime.surroundings import steady

REPLAYED = 16  # calls that are kept whole, over all inputs


@dataclass(frozen=True)
class Work:
    """What there is to run.

    Attributes:
        digests: of the inputs.
        sampler: what steps are made by, for people.
        run: makes the calls of input number i.
    """

    digests: list[str]
    sampler: str
    run: Callable[[int], Any]


@steady()
def calibrate(
    pipe: Any,
    out: str | Path,
    inputs: Given | None = None,
    *,
    prompts: Sequence[str] | str | Path | None = None,
    labels: Sequence[int] | None = None,
    run: Callable[..., Any] | None = None,
    samples: int | None = None,
    batch: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
    rows: int = 64,
    attention: bool = True,
    memory_budget: int | None = None,
    free_text_encoders: bool = False,
    quiet: bool = False,
    **call: Any,
) -> CalibrationStats:
    """Run a float pipeline on its inputs, and store what the linears of its transformers read.

    A killed run goes on after the last finished input: call it again with the same arguments. More inputs at the end of
    the list are added to what is there. Processes that share a folder share the work: each begins with its part (RANK
    and WORLD_SIZE of torchrun and accelerate), and takes over what nobody works on. The bytes are those of one process,
    but for the log.

    Args:
        pipe: a diffusers pipeline; or a transformer alone, which is called with embeddings, or by `run`.
        out: folder for the statistics.
        inputs: one entry per call: its keyword arguments (prompt, image, height, num_inference_steps, ...; `seed` for
            the noise); or a file of them: JSON lines with paths of images, text, `.safetensors` of embeddings.
        prompts: short form: texts, or a file of them or of their embeddings; a call each.
        labels: short form for class-conditional pipelines: classes, `batch` per call.
        run: makes the calls instead of a pipeline, for loops and data of your own; it is given the model, or nothing,
            and with `inputs` the entry by keyword.
        samples: of a short form, how many; default: all prompts, 32 classes.
        batch: of a short form, samples per call; default: 8 classes.
        steps: for entries that name none; default: the pipeline's own, 50 for classes.
        guidance: likewise; 1.5 for classes.
        sampler: another scheduler, one of `ditq_runtime.calls.schedulers.SAMPLERS`; default: the pipeline's own.
        seed: of what is drawn, of the noise, and of the choice of rows.
        rows: input rows to keep per site for searches, at up to 50 timesteps, over all inputs; 0 keeps none. On disk
            that is twice 4 bytes (fp32) times rows times timesteps times all channels: 6 GB for DiT-XL at 64 and 50.
        attention: also record the ranges of Q, K and V, which static attention scales need.
        memory_budget: bytes that the peak should stay below; lowers `batch` of classes, refuses inputs that do not fit.
        free_text_encoders: encode all prompts first and drop the text encoders; the pipeline cannot encode afterwards.
        quiet: show no progress bar.
        **call: further arguments of every call.

    Returns:
        The opened statistics.

    Raises:
        ValueError: nothing to call it with, arguments that the pipeline does not take, an unsupported transformer, a
            budget that one input does not fit into.
        StatisticsError: `out` holds something else, or the model gave values that are not finite.
    """
    models = watched(pipe, rows)
    folder = Path(out)
    check_place(folder)
    form: dict[str, Any] = {
        "prompts": prompts, "labels": labels, "samples": samples, "steps": steps, "guidance": guidance, "seed": seed,
        "call": call,
    }  # fmt: skip
    with ExitStack() as stack:
        if run is not None:
            work = own_work(pipe, run, inputs)
        else:
            driven = pipeline_of(pipe)
            stack.enter_context(ready(driven, sampler or ""))
            if memory_budget is not None:
                one = gather("calibrate", driven, inputs, batch=1, **form)[0]
                batch = fitting_batch(driven, models, one, batch, rows, attention, memory_budget)
            given = gather("calibrate", driven, inputs, batch=batch, **form)
            if free_text_encoders:
                stack.enter_context(encoded_once(driven, given))
            work = pipeline_work(driven, given)
        models = with_sites(models, work)
        settings = {"rows": rows, "seed": seed, "attention": attention}
        manifest = claim_folder(folder, manifest_of(models, work, settings))
        make_shards(folder, manifest, models, work.run, quiet)
    merge_shards(folder, manifest, quiet)
    return CalibrationStats.open(folder)


def watched(pipe: Any, rows: int) -> Models:
    """The transformers with their families; ValueError for a class that is no transformer, and for a negative count."""
    if rows < 0:
        raise ValueError(f"calibrate: rows must be 0 (none) or more, got {rows}")
    found = {n: float_transformer(m, "calibrate") for n, m in transformers_in(pipe).items()}
    return {name: (model, family_of(type(model).__name__)) for name, model in found.items()}


def with_sites(models: Models, work: Work) -> Models:
    """The sites of classes without a table; where no inputs can be made, found on the first call of the first input."""
    found = {}
    for name, (model, _) in models.items():
        try:
            family = family_for(model)
        except NoInputs:
            family = family_for(model, first_call(model, lambda: work.run(0)))
        found[name] = model, family
    return found


def pipeline_work(pipe: Any, given: list[Input]) -> Work:
    """The calls of a `ready` pipeline."""
    sampler = type(getattr(pipe, "scheduler", None)).__name__
    return Work([one.digest for one in given], sampler, lambda index: draw(pipe, given[index]))


def own_work(pipe: Any, run: Callable[..., Any], inputs: Given | None) -> Work:
    """Somebody's own loop: one call of it, or one per entry of `inputs`."""
    if not callable(run):
        raise ValueError(f"calibrate: run must be a function that calls the model, got {run!r}")
    if isinstance(inputs, str | Path):
        raise ValueError("calibrate: with run=, inputs are a list of keyword arguments, not a file")
    entries: list[dict[str, Any]] = [{}] if inputs is None else [dict(entry) for entry in inputs]
    positional = [
        p for p in inspect.signature(run).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in entries[0]
    ]  # fmt: skip
    given = (pipe,) if positional else ()
    seeds = [splitmix64(index) for index in range(len(entries))]
    name = getattr(run, "__qualname__", type(run).__name__)
    digests = [Input({"run": name, **e}, (s,)).digest for e, s in zip(entries, seeds, strict=True)]

    def call(index: int) -> None:
        torch.manual_seed(seeds[index])
        with torch.no_grad():
            run(*given, **entries[index])

    return Work(digests, "run", call)


def fitting_batch(
    pipe: Any,
    models: Models,
    one: Input,
    batch: int | None,
    rows: int,
    attention: bool,
    budget: int,
) -> int | None:
    """Samples per call of a short form that fit a budget; ValueError if the first input does not."""
    fewer = {"num_inference_steps": 1} if "num_inference_steps" in one.arguments else {}
    trial = Input({**one.arguments, **fewer}, one.seeds)
    size = sum(_statistics(model, family, rows) for model, family in models.values())
    watch = Recorder(models, RowChoice(rows, 0, 0), 0, 0, attention, lambda visit: None)

    def step() -> None:
        with watch:
            draw(pipe, trial)

    found = needs([model for model, _ in models.values()], step, size)
    fits = found.fitting(budget, batch or LABELS_PER_CALL)
    return fits if "class_labels" in one.arguments else batch


def _statistics(model: nn.Module, family: Family, rows: int) -> int:
    """Bytes of the statistics of one timestep: fp32 ranges and rows of every site, ranges of Q, K and V."""
    tables = family.block_tables(model).items()
    names = [f"{block}.{site.consumers[0]}" for block, table in tables for site in table.sites]
    widths = [get_linear(model, name).in_features for name in names]
    return sum(4 * width * (2 + rows) for width in widths) + 2 * 4 * 3 * max(widths) * len(tables)


def manifest_of(models: Models, work: Work, settings: dict[str, Any]) -> dict[str, Any]:
    """What the statistics will belong to; the first run of a folder decides how rows are shared among inputs."""
    each = {
        "rows_per_input": -(-settings["rows"] // len(work.digests)),
        "calls_per_input": -(-REPLAYED // len(work.digests)),
    }
    return {
        "models": {
            name: {
                "architecture": type(model).__name__,
                "model_hash": model_hash(model),
                "dtype": str(next(model.parameters()).dtype),
                **sites_record(model, family),
            }
            for name, (model, family) in models.items()
        },
        "settings": {**settings, **each},
        "sampler": work.sampler,
        "inputs": work.digests,
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }

"""Thread stress: several threads on one packed model must get the bits that one thread gets.

Kinds: `shared`, threads that call the model at timesteps of their own; `several`,
each thread on a copy of its own; `prepared`, half of them in pipelines that
`ditq.prepare` hoists the modulation of; `reported`, one more thread asks for execution reports all the while.
"""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler

import ditq_runtime as ditq
from ditq_runtime.families import family_of

THREADS, STEPS = 6, 4
KINDS = ("shared", "several", "prepared", "reported")
BLOCKS = 2  # of the demo model: threads meet in every layer, more blocks only take longer
FORMATS = [  # method, weights, activations, attention
    *itertools.product(("htg",), ("w8", "w4p", "w4g"), ("token", "static"), ("none",)),
    ("htg", "w8", "token_asym", "none"),
    ("htg", "w8", "static", "int8"),
    ("htg", "w8", "token", "bf16"),
    ("smoothquant", "w8", "token", "none"),
]
OTHERS = ("FluxTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel")


@dataclass(frozen=True)
class Outcome:
    """What the threads of one combination got.

    Attributes:
        name: of the model.
        kind: one of `KINDS`.
        forwards: of all threads.
        wrong: those that differ from the forwards of one thread.
    """

    name: str
    kind: str
    forwards: int
    wrong: int


Work = Callable[[], list[torch.Tensor]]


def stress_model(name: str, model: Any, kind: str, forwards: int, seconds: float = 0.0) -> Outcome:
    """Run one combination.

    Args:
        name: for the outcome.
        model: a packed transformer on the CPU, with example inputs in its family table.
        kind: one of `KINDS`; `prepared` needs modulation that can be hoisted.
        forwards: at least, of all threads.
        seconds: at least, of the clock.

    Raises:
        Exception: the first one of any thread.
    """
    works, undo = _works(model, kind)
    expected = [work() for work in works]  # one thread
    rounds = -(-forwards // sum(map(len, expected)))
    ends, failures = threading.Event(), list[BaseException]()
    done, wrong, end = [0] * THREADS, [0] * THREADS, time.monotonic() + seconds

    def repeat(i: int) -> None:
        try:
            while done[i] < rounds * len(expected[i]) or time.monotonic() < end:
                pairs = zip(works[i](), expected[i], strict=True)
                wrong[i] += sum(not torch.equal(got, truth) for got, truth in pairs)
                done[i] += len(expected[i])
        except BaseException as error:
            failures.append(error)

    def report() -> None:
        try:
            while not ends.is_set():
                ditq.execution_report(model)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(THREADS)]
    reporter = [threading.Thread(target=report)] if kind == "reported" else []
    for thread in (*threads, *reporter):
        thread.start()
    for thread in threads:
        thread.join()
    ends.set()
    for thread in reporter:
        thread.join()
    undo()
    if failures:
        raise failures[0]
    return Outcome(name, kind, sum(done), sum(wrong))


def _works(model: Any, kind: str) -> tuple[list[Work], Callable[[], None]]:
    """What each thread does, and how to take out what was prepared."""
    prepared = []
    works = []
    for i in range(THREADS):
        scheduler = schedule(STEPS + i)
        if kind == "prepared" and i % 2:
            prepared.append(ditq.prepare(SimpleNamespace(transformer=model, scheduler=scheduler)))
        own = copy.deepcopy(model) if kind == "several" else model
        works.append(sampling(own, scheduler))

    def undo() -> None:
        for handle in prepared:
            handle.undo()

    return works, undo


def schedule(number: int) -> Any:
    """A sampler of so many steps."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(number)
    return scheduler


def sampling(model: Any, scheduler: Any) -> Work:
    """The model at every step of a schedule, called as a pipeline would."""
    family = family_of(type(model).__name__)
    assert family.example_inputs is not None
    inputs = family.example_inputs(model)
    hidden, given = inputs.pop("hidden_states"), inputs.pop("timestep")

    def sample() -> list[torch.Tensor]:
        outputs = []
        for step in scheduler.timesteps:
            latents = scheduler.scale_model_input(hidden, step)
            timestep = (step * family.timestep_scale).to(given.dtype).expand(len(given))
            with torch.no_grad():
                outputs.append(model(hidden_states=latents, timestep=timestep, **inputs)[0])
        return outputs

    return sample


def models(
    folder: Path, formats: Iterable[tuple[str, ...]] = FORMATS, others: Iterable[str] = OTHERS
) -> Iterator[tuple[str, Any]]:
    """Packed tiny models: name, transformer. DiT in all formats, and the other families with timestep groups."""
    from ditq_bench.zoo import CLASSES
    from ditq_converters import Recipe, calibrate, convert, open_model

    pipe = open_model("demo:digits")
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:BLOCKS]
    pipe.transformer.register_to_config(num_layers=BLOCKS)
    options: dict[str, Any] = {"attention": True, "quiet": True}
    stats = calibrate(pipe, folder / "stats", steps=8, samples=2, **options)
    for method, weights, activations, attention in formats:
        recipe = Recipe(method, weights, activations, attention=attention)
        name = f"DiT {method} {weights} {activations}, attention {attention}"
        yield name, convert(pipe, recipe, stats, quiet=True)
    for cls in others:
        model = CLASSES[cls].build()
        run = sampling(model, schedule(STEPS))
        stats = calibrate(model, folder / cls, run=lambda _, run=run: run(), **options)
        recipe = Recipe("htg", "w8", attention="int8")
        yield f"{cls} htg w8 token, attention int8", convert(model, recipe, stats, quiet=True)

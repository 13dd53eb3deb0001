"""Run a pipeline on all inputs of an evaluation and note what it predicted, drew, and called its transformers with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.transformer_calls import TransformerCall, map_tensors, timestep_of
from ditq_converters.hooks import by_name, hooked
from ditq_converters.sites.find import timestep_carrier
from ditq_runtime.calls.inputs import Input
from ditq_runtime.calls.parts import transformers_in
from ditq_runtime.calls.pipeline import SchedulerStep, draw, ready, watched_steps

Tick = Callable[[], None]


@dataclass(frozen=True)
class Recorded:
    """One forward of a transformer.

    Attributes:
        call: its arguments.
        output: its first output, fp32 on the CPU, before guidance.
    """

    call: TransformerCall
    output: torch.Tensor


@dataclass(frozen=True)
class Run:
    """What one pipeline did with all inputs.

    Attributes:
        steps: per input, every step of the scheduler with the guided prediction.
        calls: of the first inputs, every forward of a transformer.
        latents: [S, ...] fp32, final; None where a pipeline hides them, or inputs differ in size.
        images: [S, C, H, W] fp32 in [-1, 1]; None without a VAE, or where inputs differ in size.
    """

    steps: list[list[SchedulerStep]]
    calls: list[list[Recorded]]
    latents: torch.Tensor | None
    images: torch.Tensor | None


@torch.no_grad()
def run(
    pipe: Any,
    inputs: Sequence[Input],
    sampler: str = "",
    few: int = 0,
    decode: bool = False,
    tick: Tick | None = None,
) -> Run:
    """Draw all inputs.

    Args:
        pipe: a pipeline.
        inputs: of its calls.
        sampler: another scheduler; "" for its own.
        few: record the transformer's calls of the first inputs, until they draw so many samples.
        decode: also decode images.
        tick: told when an input is done.
    """
    steps, calls, latents, images, seen = [], [], [], [], 0
    with ready(pipe, sampler):
        for given in inputs:
            with watched_steps(pipe) as made, _recorded_calls(pipe, seen < few) as recorded:
                drawn = draw(pipe, given, decode)
            steps.append(made)
            if seen < few:
                calls.append(recorded)
            seen += given.samples
            latents.append(drawn.latents)
            images.append(drawn.images)
            if tick is not None:
                tick()
    return Run(steps, calls, _stacked(latents), _stacked(images))


def _stacked(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    alike = len({part.shape[1:] for part in there}) == 1 and len(there) == len(parts)
    return torch.cat(there) if alike else None


@contextmanager
def _recorded_calls(pipe: Any, wanted: bool) -> Iterator[list[Recorded]]:
    """Every forward of the pipeline's transformers inside the block; a tensor that stays the same is copied once."""
    found: list[Recorded] = []
    copies: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_inference():
            return tensor.clone()
        key = id(tensor), tensor._version
        if key not in copies:
            copies[key] = (
                tensor,
                tensor.detach().clone(),
            )  # the original too, so that its id is not used again
        return copies[key][1]

    def after(component: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = by_name(module, args, kwargs)
            now = timestep_of(timestep_carrier(module, given), given)
            kept_args, kept = map_tensors(copy, (args, kwargs))
            first = output if isinstance(output, torch.Tensor) else output[0]
            call = TransformerCall(component, now, kept_args, kept)
            found.append(Recorded(call, first.detach().float().cpu()))

        return note

    models = transformers_in(pipe).items() if wanted else ()
    with hooked(m.register_forward_hook(after(c), with_kwargs=True) for c, m in models):
        yield found

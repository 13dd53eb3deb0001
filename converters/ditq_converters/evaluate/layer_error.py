"""Error of a packed model, layer by layer and step by step, on either of two inputs.

`cascade`: each linear on what its quantized predecessors give it, as in use. `forced (block)`: each packed block on
the float model's block input, so that an error is made where it is shown. A linear alone cannot be forced: a packed
linear expects an input that its producer has smoothed, which the float model never computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.trajectory import Call, SamplingPlan, predict
from ditq_runtime.families import ValueRows, family_of

CASCADE = "cascade"
FORCED = "forced (block)"
STREAMS = ("hidden_states", "encoder_hidden_states")


@dataclass(frozen=True)
class LayerErrors:
    """Error of each layer's output Yq against the float Y, over all tokens, channels and samples; fp64 [layers, calls].

    Attributes:
        mode: CASCADE or FORCED.
        names: of the layers: linears in cascade, whole blocks when forced.
        relative: |Yq - Y| / |Y|, Frobenius.
        max_abs: largest |Yq - Y|, in units of Y.
        cosine: of the angle between Yq and Y.
    """

    mode: str
    names: list[str]
    relative: torch.Tensor
    max_abs: torch.Tensor
    cosine: torch.Tensor

    @property
    def sqnr_db(self) -> torch.Tensor:
        """[layers, calls] -20 log10(relative), the ratio of sums; infinite where there is no error."""
        return -20 * self.relative.log10()


def comparable_layers(model: nn.Module) -> list[str]:
    """Linears whose output a fold leaves as it was: not the modulations, not V (scaled rows)."""
    names = []
    for block, table in family_of(type(model).__name__).block_tables(model).items():
        scaled = {
            value
            for site in table.sites
            if isinstance(site.producer, ValueRows)
            for value in site.producer.values
        }
        inside = [name for site in table.sites for name in site.consumers if name not in scaled]
        names += [f"{block}.{name}" for name in inside]
    return names


def layer_errors(
    model: nn.Module,
    quantized: nn.Module,
    calls: list[Call],
    plan: SamplingPlan,
    after_call: Callable[[], None] | None = None,
) -> tuple[list[str], torch.Tensor]:
    """Relative Frobenius error |Yq - Y| / |Y| per layer and call; both models get the float model's latents.

    Args:
        model: float transformer.
        quantized: packed transformer.
        calls: of a float run.
        plan: the plan of that run.
        after_call: told when a call is done.

    Returns:
        Layer names, and errors fp64 [layers, calls].
    """
    errors = cascade_errors(model, quantized, calls, plan, after_call)
    return errors.names, errors.relative


def cascade_errors(
    model: nn.Module,
    quantized: nn.Module,
    calls: list[Call],
    plan: SamplingPlan,
    after_call: Callable[[], None] | None = None,
) -> LayerErrors:
    """Every linear that compares, both models run freely from the float model's latents; see `layer_errors`."""
    names = comparable_layers(model)
    return _measure(CASCADE, model, quantized, names, calls, plan, after_call)


def forced_errors(
    model: nn.Module,
    quantized: nn.Module,
    calls: list[Call],
    plan: SamplingPlan,
    after_call: Callable[[], None] | None = None,
) -> LayerErrors:
    """Every block, the packed one on the float block's input; see `layer_errors`.

    An output is the whole residual stream, which a block only adds to: its error is small beside that of a linear.
    """
    names = family_of(type(model).__name__).block_names(model)
    return _measure(FORCED, model, quantized, names, calls, plan, after_call)


@torch.no_grad()
def _measure(
    mode: str,
    model: nn.Module,
    quantized: nn.Module,
    names: list[str],
    calls: list[Call],
    plan: SamplingPlan,
    after_call: Callable[[], None] | None,
) -> LayerErrors:
    sums = torch.zeros(
        len(calls), len(names), 4, dtype=torch.float64
    )  # |Y|^2, |Yq - Y|^2, |Yq|^2, Y.Yq
    largest = torch.zeros(len(calls), len(names), dtype=torch.float64)
    for index, call in enumerate(calls):
        for latents, part in _micro_batches(call.latents, plan):
            with _recorded(model, names) as (inputs, truth):
                predict(model, latents, torch.tensor(call.timestep), part)
            given = inputs if mode == FORCED else {}
            with _recorded(quantized, names, given) as (_, outputs):
                predict(quantized, latents, torch.tensor(call.timestep), part)
            for row, name in enumerate(names):
                y, yq = truth.pop(name).double(), outputs.pop(name).double()
                noise = yq - y
                dots = (y.square(), noise.square(), yq.square(), y * yq)
                sums[index, row] += torch.stack([product.sum() for product in dots]).cpu()
                largest[index, row] = max(float(largest[index, row]), float(noise.abs().max()))
        if after_call is not None:
            after_call()
    signal, noise_power, power, dot = sums.transpose(0, 1).unbind(-1)
    relative, cosine = (noise_power / signal).sqrt(), dot / (signal * power).sqrt()
    return LayerErrors(mode, names, relative, largest.T.contiguous(), cosine)


def _micro_batches(
    latents: torch.Tensor, plan: SamplingPlan
) -> Iterator[tuple[torch.Tensor, SamplingPlan]]:
    """One forward at a time, so that the outputs of all layers are held for one micro-batch only."""
    for start in range(0, len(latents), plan.micro_batch):
        labels = plan.labels[start : start + plan.micro_batch]
        yield latents[start : start + plan.micro_batch], replace(plan, labels=labels)


Given = dict[str, dict[str | int, torch.Tensor]]  # module -> place of an argument -> tensor


@contextmanager
def _recorded(
    model: nn.Module, names: list[str], given: Given | None = None
) -> Iterator[tuple[Given, dict[str, torch.Tensor]]]:
    """Record streams and output of modules over one forward; modules in `given` get those streams instead."""
    inputs: Given = {}
    outputs: dict[str, torch.Tensor] = {}
    instead = given or {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            inputs[name] = streams = _streams(args, kwargs)
            if name not in instead:
                return None
            own: dict[Any, torch.Tensor] = {
                place: instead[name][place].to(x) for place, x in streams.items()
            }
            args = tuple(own.pop(place, x) for place, x in enumerate(args))
            return args, kwargs | own

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            parts = [output] if isinstance(output, torch.Tensor) else output
            whole = torch.cat([part for part in parts if part is not None], dim=1)
            outputs[name] = whole.detach()

        return hook

    hooks = []
    for name in names:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        hooks.append(module.register_forward_hook(after(name)))
    try:
        yield inputs, outputs
    finally:
        for handle in hooks:
            handle.remove()


def _streams(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str | int, torch.Tensor]:
    """The tokens that a module is given: image, and text where it has any; by position or by name."""
    found: dict[str | int, torch.Tensor] = {0: args[0]} if args else {}
    found.update((name, kwargs[name]) for name in STREAMS if kwargs.get(name) is not None)
    return found

"""Error of a packed model, layer by layer and step by step, on either of two inputs.

`cascade`: each linear on what its quantized predecessors give it, as in use. `forced (block)`: each packed block on
the float model's block input, so that an error is made where it is shown. A linear alone cannot be forced: a packed
linear expects an input that its producer has smoothed, which the float model never computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.schedule import schedule_of
from ditq_converters.evaluate.runs import Recorded
from ditq_converters.sites import family_or_row
from ditq_runtime.families import Producer, ProductRows, ValueRows

CASCADE = "cascade"
FORCED = "forced (block)"
STREAMS = ("hidden_states", "encoder_hidden_states")
TRANSFORMER = "transformer"
Models = Mapping[str, nn.Module]
Calls = Sequence[Sequence[Recorded]]
Series = list[tuple[float, tuple[torch.Tensor, ...]]]  # timestep, what was found there


@dataclass(frozen=True)
class LayerErrors:
    """Error of each layer's output Yq against the float Y, over all tokens, channels and samples; fp64 [layers, T].

    It is nan where a layer did not run at a timestep.

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
        """[layers, T] -20 log10(relative), the ratio of sums; infinite where there is no error."""
        return -20 * self.relative.log10()


def comparable_layers(model: nn.Module, inputs: dict[str, Any] | None = None) -> list[str]:
    """Linears whose output a fold leaves as it was: not the modulations, not V or a factor (scaled rows).

    Args:
        model: a float transformer.
        inputs: keyword arguments of one forward, to find the sites of a class without a table.
    """
    names = []
    for block, table in family_or_row(model, inputs).block_tables(model).items():
        scaled = {name for site in table.sites for name in _scaled(site.producer)}
        inside = [name for site in table.sites for name in site.consumers if name not in scaled]
        names += [f"{block}.{name}" for name in inside]
    return names


def _scaled(producer: Producer) -> tuple[str, ...]:
    match producer:
        case ValueRows(values):
            return tuple(values)
        case ProductRows(linear):
            return (linear,)
    return ()


def layer_errors(
    mode: str,
    models: Models,
    quantized: Models,
    calls: Calls,
    after_call: Callable[[], None] | None = None,
) -> LayerErrors:
    """Every linear that compares, or every block.

    Args:
        mode: CASCADE: linears, both models given the calls of the float model's run. FORCED: blocks, the packed one on
            the float block's input; an output is the whole residual stream, which a block only adds to, so its error
            is small beside that of a linear.
        models: component -> float transformer.
        quantized: component -> packed transformer.
        calls: of the float pipeline's run, input by input.
        after_call: told when a call is done.
    """
    found = [layer_series(mode, models, quantized, run, after_call) for run in calls]
    return gathered(mode, found[0][0], [series for _, series in found])


def gathered(mode: str, names: list[str], runs: Sequence[Series]) -> LayerErrors:
    """The errors of all inputs, in their order."""
    schedule = schedule_of([[timestep for timestep, _ in run] for run in runs])
    shape = len(names), len(schedule.timesteps)
    sums = torch.zeros(*shape, 4, dtype=torch.float64)
    largest = torch.zeros(shape, dtype=torch.float64)
    for timestep, (dots, most) in (one for run in runs for one in run):
        step = schedule.bin_of[timestep]
        sums[:, step] += dots
        largest[:, step] = torch.maximum(largest[:, step], most)
    signal, noise_power, power, dot = sums.unbind(-1)
    relative, cosine = (noise_power / signal).sqrt(), dot / (signal * power).sqrt()
    return LayerErrors(mode, names, relative, largest, cosine)


@torch.no_grad()
def layer_series(
    mode: str,
    models: Models,
    quantized: Models,
    calls: Sequence[Recorded],
    after_call: Callable[[], None] | None = None,
) -> tuple[list[str], Series]:
    """The layers, and per call of one input the timestep, [layers, 4] and [layers]; zeros for a layer that did not run.

    The four are |Y|^2, |Yq - Y|^2, |Yq|^2 and Y.Yq, fp64; then the largest |Yq - Y|.
    """
    names = {c: _layers(mode, model, _inputs(c, model, calls)) for c, model in models.items()}
    every = [(c, name) for c, inside in names.items() for name in inside]
    rows = {key: row for row, key in enumerate(every)}
    series: Series = []
    for one in calls:
        component = one.call.component
        with _recorded(models[component], names[component]) as (inputs, truth):
            one.call.replay(models[component])
        given = inputs if mode == FORCED else {}
        with _recorded(quantized[component], names[component], given) as (_, outputs):
            one.call.replay(quantized[component])
        sums = torch.zeros(len(rows), 4, dtype=torch.float64)
        largest = torch.zeros(len(rows), dtype=torch.float64)
        for name in (name for name in names[component] if name in truth):
            row, y, yq = rows[component, name], truth.pop(name).double(), outputs.pop(name).double()
            noise = yq - y
            dots = (y.square(), noise.square(), yq.square(), y * yq)
            sums[row] = torch.stack([product.sum() for product in dots]).cpu()
            largest[row] = float(noise.abs().max())
        series.append((one.call.timestep, (sums, largest)))
        if after_call is not None:
            after_call()
    return [name if c == TRANSFORMER else f"{c}.{name}" for c, name in every], series


def _layers(mode: str, model: nn.Module, inputs: dict[str, Any] | None) -> list[str]:
    if mode == CASCADE:
        return comparable_layers(model, inputs)
    return family_or_row(model, inputs).block_names(model)


def _inputs(component: str, model: nn.Module, calls: Sequence[Recorded]) -> dict[str, Any] | None:
    """What a transformer was called with first; None if it was not."""
    first = next((one.call for one in calls if one.call.component == component), None)
    return None if first is None else first.by_name(model)


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

    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            stack.enter_context(module.register_forward_pre_hook(before(name), with_kwargs=True))
            stack.enter_context(module.register_forward_hook(after(name)))
        yield inputs, outputs


def _streams(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str | int, torch.Tensor]:
    """The tokens that a module is given: image, and text where it has any; by position or by name."""
    found: dict[str | int, torch.Tensor] = {0: args[0]} if args else {}
    found.update((name, kwargs[name]) for name in STREAMS if kwargs.get(name) is not None)
    return found

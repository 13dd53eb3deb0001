"""Sites whose readers keep float activations, weight-only in 8 bits: where int8 costs the model's output most.

One site after another is taken out of the model as it will be packed, and the error of its output is measured on
replayed calls. That costs time where the file runs: those products are not integer ones. So of two sites that gain as
much, the one with fewer products is taken, and the plan says what share of all products it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

import ditq_kernels as k
from ditq_converters.auto.measured import emulated, noise
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.prefix import Prefix
from ditq_converters.plan.entries import LinearPlan
from ditq_converters.plan.plan import Plan
from ditq_converters.progress import progress_bar
from ditq_converters.sites.find import family_for
from ditq_converters.streaming.model import weights_of

WEIGHT_ONLY: dict[str, Any] = {  # such a linear is rounded by its weights alone
    "weights": "w8",
    "group_size": None,
    "symmetric": False,
    "activations": "none",
    "rank": 0,
    "rounding": "nearest",
    "bias_correction": False,
}
ALIKE = 3  # decimals of a gain; what agrees in them gains as much


@dataclass(frozen=True)
class FloatSite:
    """One site without integer products.

    Attributes:
        entries: its readers in the plan.
        gain: share of the noise that it takes away.
        share: of all products of blocks, by weights.
    """

    entries: tuple[LinearPlan, ...]
    gain: float
    share: float


@torch.no_grad()
def best_float_sites(
    model: nn.Module,
    plan: Plan,
    stats: CalibrationStats,
    number: int,
    *,
    quiet: bool = False,
    inputs: dict[str, Any] | None = None,
) -> list[FloatSite]:
    """The sites that gain most by float activations, each measured alone.

    Args:
        model: the float transformer.
        plan: of all others.
        stats: of the model, with calls to replay.
        number: how many at most; none that gains nothing.
        quiet: show no progress bar.
        inputs: as in `convert`.
    """
    packed, _ = emulated(model, family_for(model, inputs), plan, stats)
    wanted = packed.outputs(finished=False)
    base = noise(wanted, packed.outputs(finished=True))
    readers: dict[str, list[LinearPlan]] = {}
    for entry in plan.linears:
        if entry.is_integer:
            readers.setdefault(entry.site, []).append(entry)
    products = sum(prod(entry.shape) for listed in readers.values() for entry in listed)
    found = []
    with progress_bar("trying float activations", len(readers), quiet=quiet) as advance:
        for listed in readers.values():
            names = [entry.name for entry in listed]
            rounded = [packed.seen.get_submodule(name) for name in names]
            _put(packed, names, [_weight_only(model, name) for name in names])
            gain = 1 - noise(wanted, packed.outputs(finished=True)) / base
            _put(packed, names, rounded)
            share = sum(prod(entry.shape) for entry in listed) / products
            found.append(FloatSite(tuple(_entry(e, gain, share) for e in listed), gain, share))
            advance()
    found.sort(key=lambda site: (-round(site.gain, ALIKE), site.share))
    return [site for site in found[:number] if site.gain > 0]


def with_float_sites(plan: Plan, chosen: list[FloatSite]) -> Plan:
    """The plan with the readers of some sites weight-only."""
    entries = {entry.name: entry for site in chosen for entry in site.entries}
    return replace(plan, linears=tuple(entries.get(entry.name, entry) for entry in plan.linears))


def _entry(entry: LinearPlan, gain: float, share: float) -> LinearPlan:
    reason = (
        f"auto: float activations of its site, take away {gain:.1%} of the noise; {share:.1%} of the products of "
        "blocks run in floating point for it"
    )
    return replace(entry, **WEIGHT_ONLY, reason=reason)


def _weight_only(model: nn.Module, name: str) -> nn.Linear:
    """The float linear with 8-bit weights."""
    with weights_of(model, name) as linear:
        weight: Any = linear.weight
        bias: Any = linear.bias
        outputs, width = weight.shape
        made = nn.Linear(width, outputs, bias=bias is not None, dtype=weight.dtype)
        made.weight.copy_(k.quantize_weight_w8(weight.float()).dequantize())
        if bias is not None:
            made.bias.copy_(bias)
    return made


def _put(packed: Prefix, names: list[str], linears: list[nn.Module] | list[nn.Linear]) -> None:
    for name, linear in zip(names, linears, strict=True):
        packed.finish(name, linear)

"""A denoising step of a float model, quantized by ditq and by other libraries, in one run."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ditq_bench.model import ModelRow, Step, bench_step
from ditq_bench.others import OTHERS, refusal
from ditq_bench.peers import PEERS
from ditq_converters import Recipe, convert

QUANTIZE = {"torchao": PEERS[0][2], "sdnq": next(q for name, _, q in PEERS if name == "sdnq")}
SAGE = "sageattention"  # diffusers' own backend, which many classes ask for; linears stay float
KNOWN = (*QUANTIZE, *(name for name in OTHERS if name not in QUANTIZE))


def why_not(name: str, model: Any, device: torch.device) -> str:
    """Why a library of `KNOWN` cannot run a model on a device; empty if it can."""
    if name == "torchao":
        return "" if importlib.util.find_spec(name) else f"{name} is not installed"
    reason = refusal(name, device)
    if not reason and name not in (*QUANTIZE, SAGE):
        return f"{name} is measured by `ditq bench kernels` only"
    if not reason and name == SAGE and not hasattr(model, "set_attention_backend"):
        return f"{type(model).__name__} asks no dispatcher for its attention"
    return reason


def bench_peers(
    step: Step, names: tuple[str, ...], device: torch.device, budget: float
) -> Iterator[ModelRow]:
    """An eager step of the float model, of W8A8 by ditq without data, and of each library; what fails says why.

    Args:
        step: of a float model.
        names: in `KNOWN`.
        device: of the model.
        budget: seconds for all.
    """
    share, model = budget / (2 + len(names)), step.transformer
    packed: Any = convert(copy.deepcopy(model), Recipe("linear", "w8", "token"), None, quiet=True)
    layers = set(packed.config.quantization_config.scheme.layers)
    yield from _timed("float", step, device, share)
    yield from _timed("ditq W8A8", replace(step, transformer=packed), device, share)
    for name in names:
        try:
            twin: Any = copy.deepcopy(model)
            if name == SAGE:
                twin.set_attention_backend("sage")
            else:
                QUANTIZE[name](twin, layers)
        except Exception as failed:  # somebody else's code, which may raise anything
            reason = f"{type(failed).__name__}: {' '.join(str(failed).split())[:160]}"
            yield ModelRow("step", name, 0.0, None, reason)
            continue
        yield from _timed(name, replace(step, transformer=twin), device, share)


def _timed(name: str, step: Step, device: torch.device, budget: float) -> Iterator[ModelRow]:
    for row in bench_step(step, device, ("eager",), budget):
        yield replace(row, mode=f"eager, {name}")

"""How large a checkpoint may be: as text, and as bytes of a plan."""

from __future__ import annotations

import re
from math import prod

from torch import nn

from ditq_converters.plan.entries import LinearPlan

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
SMALLEST, LARGEST = "smallest", "largest"
SIZE = re.compile(r"([0-9.]+)\s*([A-Za-z]*|%)")


def parse_budget(text: str, model: nn.Module) -> int | None:
    """Bytes that a packed transformer may have.

    Args:
        text: `45%` of the float transformer's bytes, a size as `1.9MiB` or `350MB`, `smallest` (all in 4 bits) or
            `largest` (all in 8 bits).
        model: the float transformer.

    Returns:
        Bytes; 0 for the smallest, None for the largest.

    Raises:
        ValueError: another text.
    """
    if text in (SMALLEST, LARGEST):
        return 0 if text == SMALLEST else None
    found = SIZE.fullmatch(text.strip())
    try:
        assert found is not None
        number, unit = float(found[1]), found[2].upper()
        factor = float_bytes(model) / 100 if unit == "%" else UNITS[unit]
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"--budget must be a share as 45%, a size as 1.9MiB, {SMALLEST} or {LARGEST}, got {text!r}"
        ) from error
    return round(number * factor)


def float_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors, each once."""
    tensors = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def linear_bytes(entry: LinearPlan, bias: bool) -> int:
    """Bytes that a planned linear stores, without what its site does."""
    layer_format = entry.layer_format(bias)
    assert layer_format is not None
    outputs, inputs = entry.shape
    stored = layer_format.tensors(inputs, outputs).values()
    return sum(dtype.itemsize * prod(shape) for dtype, shape in stored)

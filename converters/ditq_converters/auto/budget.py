"""How large a checkpoint may be: as text, and as bytes of a plan."""

from __future__ import annotations

import json

from torch import nn

from ditq_converters.memory import parse_bytes

SMALLEST, LARGEST = "smallest", "largest"


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
    try:
        if not text.endswith("%"):
            return parse_bytes(text)
        share = float(text[:-1])
        if not 0 < share < 1000:  # nor NaN
            raise ValueError(text)
        return round(float_bytes(model) * share / 100)
    except ValueError as error:
        raise ValueError(
            f"--budget must be a share as 45%, a size as 1.9MiB, {SMALLEST} or {LARGEST}, got {text!r}"
        ) from error


def check_budget(text: str) -> None:
    """ValueError for a text that is no budget of any model."""
    parse_budget(text, nn.Module())


def float_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors, each once."""
    tensors = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def file_bytes(model: nn.Module) -> int:
    """Bytes of the safetensors file of a packed model, each tensor once, its header with them.

    Some bytes too many: names of dtypes are counted as the longest, and padding as what it can be.
    """
    header, place, seen = {}, 0, set[int]()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            end = place + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [place, end]}
            place = end
    return place + len(json.dumps(header, separators=(",", ":"))) + 64

"""Which classes a class-conditional pipeline draws: drawn from those that mean something, or listed in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ditq_runtime.calls.parts import transformer_of
from ditq_runtime.calls.seeds import generator

CLASSES = 1000


def class_ids(pipe: Any) -> list[int]:
    """Class ids that mean something: those the pipeline has names for, else all that the embedding has.

    Raises:
        ValueError: the model knows no classes.
    """
    config: Any = transformer_of(pipe).config
    if "num_embeds_ada_norm" not in config:
        raise ValueError(
            f"labels are classes, and {type(pipe).__name__} has none; give prompts or inputs"
        )
    named = sorted(set(getattr(pipe, "labels", {}).values()))
    return named or list(range(min(CLASSES, config.num_embeds_ada_norm)))


def draw(choices: Sequence[int], samples: int, seed: int) -> tuple[int, ...]:
    """`samples` of the choices, without replacement until all have been drawn; ValueError for none."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    drawn: list[int] = []
    shuffles = generator(seed, 0, -1)
    while len(drawn) < samples:
        drawn += [choices[i] for i in torch.randperm(len(choices), generator=shuffles).tolist()]
    return tuple(drawn[:samples])


def check_labels(labels: Sequence[int], ids: list[int], caller: str) -> tuple[int, ...]:
    """The labels; ValueError for an empty list or an id that the model does not have."""
    if not labels:
        raise ValueError(f"{caller}: labels must name at least one class, got none")
    for label in labels:
        if label not in ids:
            raise ValueError(f"{caller}: the model has no class {label}; {_choices(ids)}")
    return tuple(labels)


def read_labels(path: str | Path, pipe: Any) -> tuple[int, ...]:
    """Class ids of a text file: one id or class name per line.

    Raises:
        ValueError: a file that is empty or not text, an empty line, an unknown class; with the line's number.
        OSError: it cannot be read.
    """
    ids, names = class_ids(pipe), getattr(pipe, "labels", {})
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: is not UTF-8 text; write one class id or name per line"
        ) from error
    if not lines:
        raise ValueError(f"{path}: is empty; write one class id or name per line")
    labels = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            raise ValueError(
                f"{path}, line {number}: is empty; write one class id or name per line"
            )
        is_id = text.isascii() and text.isdigit()  # "²" is a digit that int() refuses
        label = names.get(text, int(text) if is_id else None)
        if label not in ids:
            raise ValueError(
                f"{path}, line {number}: unknown class {text!r}; {_choices(ids, names)}"
            )
        labels.append(label)
    return tuple(labels)


def _choices(ids: list[int], names: dict[str, int] | None = None) -> str:
    named = [name for name, _ in sorted((names or {}).items(), key=lambda item: item[1])]
    few = ", ".join(named[:10]) + (", ..." if len(named) > 10 else "")
    return f"its class ids are {ids[0]} to {ids[-1]}" + (f", its names {few}" if few else "")

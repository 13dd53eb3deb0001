"""What a pipeline is asked to draw: classes or text, and the arguments that every call of it takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditq_runtime.calls.inputs import BINNED_SIZES, CLASS_GUIDANCE, CLASS_STEPS
from ditq_runtime.calls.prompts import read_prompts


@dataclass(frozen=True)
class Sizes:
    """What may be left to the pipeline.

    Attributes:
        steps: denoising steps; None: 50 for classes, the pipeline's default for text.
        guidance: weight; None: 1.5 for classes, the pipeline's default for text.
        height: of an image drawn from text, in pixels; None: the pipeline's default.
        width: the same.
    """

    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Wishes:
    """What to draw.

    Attributes:
        argument: of the pipeline's call that takes `items`: `class_labels` or `prompt`.
        items: one class id or prompt per image.
        options: further arguments of the call.
    """

    argument: str
    items: Sequence[Any]
    options: dict[str, Any]


def wishes(
    pipe: Any, class_labels: str, prompt: Sequence[str], prompts: Path | None, sizes: Sizes
) -> Wishes:
    """Check what was asked for against what the pipeline can be told.

    Args:
        pipe: a diffusers pipeline.
        class_labels: ids or names, comma-separated; for pipelines that draw classes, "" for one image of each.
        prompt: texts; for pipelines that draw from text.
        prompts: a text file with one prompt per line, after those of `prompt`.
        sizes: steps, guidance, height and width.

    Raises:
        ValueError: text for a class-conditional pipeline, classes for a text pipeline, neither for the latter; an
            unknown class; an option that the pipeline does not have; a pipeline that takes neither.
        OSError: `prompts` cannot be read.
    """
    name, takes = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    if "class_labels" in takes:
        if prompt or prompts is not None:
            raise ValueError(
                f"--prompt: {name} draws classes, not text; give --class-labels, as ids or names"
            )
        return Wishes("class_labels", label_ids(pipe, class_labels), _class_options(name, sizes))
    if "prompt" not in takes:
        raise ValueError(
            f"{name} draws neither from classes nor from text; call the pipeline in Python"
        )
    if class_labels:
        raise ValueError(
            f"--class-labels: {name} draws from text and has no classes; give --prompt or --prompts"
        )
    texts = [*prompt, *(read_prompts(prompts) if prompts is not None else ())]
    if not texts:
        raise ValueError(f"{name} draws from text; give --prompt TEXT, or --prompts FILE")
    return Wishes("prompt", texts, _text_options(pipe, takes, sizes))


def _class_options(name: str, sizes: Sizes) -> dict[str, Any]:
    if sizes.height is not None or sizes.width is not None:
        raise ValueError(f"--height, --width: {name} draws images of one size; leave them out")
    return {
        "num_inference_steps": CLASS_STEPS if sizes.steps is None else sizes.steps,
        "guidance_scale": CLASS_GUIDANCE if sizes.guidance is None else sizes.guidance,
    }


def _text_options(pipe: Any, takes: Any, sizes: Sizes) -> dict[str, Any]:
    asked = {
        "--cfg": ("guidance_scale", sizes.guidance),
        "--height": ("height", sizes.height),
        "--width": ("width", sizes.width),
    }
    default = takes["num_inference_steps"].default
    options: dict[str, Any] = {"num_inference_steps": sizes.steps or default}
    for option, (argument, value) in asked.items():
        if value is not None and argument not in takes:
            raise ValueError(f"{option}: {type(pipe).__name__} has no {argument}; leave it out")
        if value is not None:
            options[argument] = value
    size = getattr(pipe.transformer.config, "sample_size", None)
    if "use_resolution_binning" in takes and size not in BINNED_SIZES:
        options["use_resolution_binning"] = False  # diffusers has no bins for this size, and raises
    return options


def label_ids(pipe: Any, text: str) -> list[int]:
    """Class ids from ids or names; without any, one of each class the pipeline names."""
    names = getattr(pipe, "labels", {})
    if not text:
        return sorted(set(names.values()))[:16] or list(range(8))
    ids, limit = [], num_classes(pipe)
    for part in (piece.strip() for piece in text.split(",")):
        if part in names:
            ids.append(names[part])
        elif part.isascii() and part.isdigit() and int(part) < limit:
            ids.append(int(part))
        else:
            raise ValueError(
                f"--class-labels: {part!r} is neither a class id below {limit} "
                f"nor one of {', '.join(list(names)[:12]) or '(the pipeline names no classes)'}"
            )
    return ids


def num_classes(pipe: Any) -> int:
    """Classes that a pipeline draws: those it names, where it names 0 to n - 1; else as many as it has embeddings."""
    named = set(getattr(pipe, "labels", {}).values())
    embedded: int = pipe.transformer.config.num_embeds_ada_norm
    return len(named) if named and named == set(range(len(named))) else embedded


def draw(pipe: Any, wanted: Wishes, seed: int, batch: int) -> list[Any]:
    """One PIL image per item, in batches; image i has its own generator seeded seed + i.

    Raises:
        ValueError: the pipeline makes something else than images.
    """
    import torch

    images: list[Any] = []
    for start in range(0, len(wanted.items), batch):
        part = wanted.items[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        made = pipe(**{wanted.argument: part}, generator=generators, **wanted.options)
        if not hasattr(made, "images"):
            raise ValueError(f"{type(pipe).__name__} makes no images; call the pipeline in Python")
        images += made.images
    return images

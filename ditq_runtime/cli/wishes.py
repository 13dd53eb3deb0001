"""The short forms of `ditq sample`: classes or text, and the arguments that every call takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditq_runtime.calls.inputs import (
    BINNED_SIZES,
    CLASS_GUIDANCE,
    CLASS_STEPS,
    Input,
    alike,
    check_encoded,
    gather,
)
from ditq_runtime.calls.prompts import read_prompts
from ditq_runtime.calls.saved import saved_call


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


def wished(
    pipe: Any,
    inputs: Path | None,
    class_labels: str,
    prompt: Sequence[str],
    prompts: Path | None,
    sizes: Sizes,
    seed: int,
    batch: int,
) -> list[Input]:
    """The calls of a file of inputs or of embeddings, or of a short form; errors as `gather` and `wishes`."""
    embeddings = prompts is not None and prompts.suffix == ".safetensors"
    if inputs is None and not embeddings:
        return wishes(pipe, class_labels, prompt, prompts, sizes, seed, batch)
    asked = {"height": sizes.height, "width": sizes.width}
    return gather(
        "sample", pipe, inputs or prompts, steps=sizes.steps, guidance=sizes.guidance, seed=seed,
        call={name: value for name, value in asked.items() if value is not None},
    )  # fmt: skip


def wishes(
    pipe: Any,
    class_labels: str,
    prompt: Sequence[str],
    prompts: Path | None,
    sizes: Sizes,
    seed: int = 0,
    batch: int = 16,
) -> list[Input]:
    """Check what was asked for against what the pipeline can be told, and make calls of it.

    Args:
        pipe: a diffusers pipeline.
        class_labels: ids or names, comma-separated; for pipelines that draw classes, "" for one image of each.
        prompt: texts; for pipelines that draw from text.
        prompts: a text file with one prompt per line, after those of `prompt`.
        sizes: steps, guidance, height and width.
        seed: of the first image; image i has its own generator, seeded seed + i.
        batch: images per call.

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
        options = _class_options(name, sizes)
        return _calls("class_labels", label_ids(pipe, class_labels), options, seed, batch)
    if "prompt" not in takes:
        raise ValueError(
            f"{name} draws neither from classes nor from text; give the arguments of its calls with --inputs"
        )
    if class_labels:
        raise ValueError(
            f"--class-labels: {name} draws from text and has no classes; give --prompt or --prompts"
        )
    saved = saved_call(pipe)
    known = saved.pop("prompt", [])
    texts = [*prompt, *(read_prompts(prompts) if prompts is not None else ())] or known
    if not texts:
        raise ValueError(
            f"{name} draws from text; give --prompt TEXT, or --prompts FILE, or --inputs FILE"
        )
    check_encoded("sample", pipe, {"prompt": texts})
    return _calls("prompt", texts, saved | _text_options(pipe, takes, sizes, saved), seed, batch)


def _calls(
    argument: str, items: Sequence[Any], options: dict[str, Any], seed: int, batch: int
) -> list[Input]:
    """Calls of at most `batch` items each."""
    made = []
    for start in range(0, len(items), batch):
        part = list(items[start : start + batch])
        seeds = tuple(seed + start + i for i in range(len(part)))
        made.append(Input(alike({**options, argument: part}), seeds))
    return made


def _class_options(name: str, sizes: Sizes) -> dict[str, Any]:
    if sizes.height is not None or sizes.width is not None:
        raise ValueError(f"--height, --width: {name} draws images of one size; leave them out")
    return {
        "num_inference_steps": CLASS_STEPS if sizes.steps is None else sizes.steps,
        "guidance_scale": CLASS_GUIDANCE if sizes.guidance is None else sizes.guidance,
    }


def _text_options(pipe: Any, takes: Any, sizes: Sizes, saved: dict[str, Any]) -> dict[str, Any]:
    asked = {
        "--cfg": ("guidance_scale", sizes.guidance),
        "--height": ("height", sizes.height),
        "--width": ("width", sizes.width),
    }
    default = takes["num_inference_steps"].default
    own = saved.get("num_inference_steps", default)
    options: dict[str, Any] = {"num_inference_steps": sizes.steps or own}
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

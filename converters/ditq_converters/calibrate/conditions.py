"""What the samples of a run are told: one class or one prompt each, and what stands for none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditq_converters.calibrate.captions import Captions, read_captions
from ditq_converters.calibrate.hosts import host_of
from ditq_converters.calibrate.labels import check_labels, class_ids, draw_labels


@dataclass(frozen=True)
class Conditions:
    """One per sample.

    Attributes:
        ids: class ids, or rows of `captions`.
        null: the id of no class, or of the empty prompt.
        captions: of a text-conditioned model.
    """

    ids: tuple[int, ...]
    null: int
    captions: Captions | None


def choose(
    caller: str,
    pipe: Any,
    model: Any,
    samples: int,
    seed: int,
    guidance: float,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | str | Path | None = None,
) -> Conditions:
    """Draw classes or prompts, without replacement until all have been drawn.

    Args:
        caller: whose errors these are.
        pipe: a pipeline, or its transformer alone.
        model: its transformer.
        samples: how many.
        seed: of the draw.
        guidance: weight; above 1 the empty prompt is needed, but by a model that is told its guidance.
        labels: class ids, one per sample, instead of drawing.
        prompts: of a text-conditioned model, as `captions.read_captions` takes them.

    Raises:
        ValueError: prompts for a class-conditional model, labels for a text-conditioned one, prompts that are missing
            or do not fit, an unknown class.
    """
    host, name = host_of(model), type(model).__name__
    widths = host.captions(model)
    if not widths:
        if prompts is not None:
            raise ValueError(
                f"{caller}: {name} is conditioned on classes; pass labels, not prompts"
            )
        ids = class_ids(pipe, model)
        drawn = draw_labels(ids, samples, seed)
        chosen = drawn if labels is None else check_labels(tuple(labels), ids)
        return Conditions(chosen, model.config.num_embeds_ada_norm, None)
    if prompts is None:
        raise ValueError(
            f"{caller}: {name} is conditioned on text; pass prompts, or a .safetensors file of their embeddings"
        )
    captions = read_captions(prompts, pipe, name, widths)
    if labels is not None:
        raise ValueError(f"{caller}: labels are classes, and this model is told prompts")
    if guidance > 1 and not host.distilled and not captions.has_null:
        raise ValueError(
            f"{caller}: guidance above 1 needs the negative_ embeddings of the empty prompt; add them, or use "
            "guidance 1"
        )
    chosen = draw_labels(list(range(captions.count)), samples, seed)
    return Conditions(chosen, captions.count, captions)

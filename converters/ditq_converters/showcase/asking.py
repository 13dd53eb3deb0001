"""How the demo models are asked for digits: by classes, or by prompts as their folder says; each with its own noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ditq_converters.demo.digits import DIGIT_NAMES
from ditq_runtime.calls.labels import draw
from ditq_runtime.calls.saved import saved_call
from ditq_runtime.calls.seeds import splitmix64


def digits(samples: int, seed: int) -> tuple[int, ...]:
    """Digits to draw, all of them equally often."""
    return draw(range(10), samples, seed)


def asked_for(
    pipe: Any, labels: Sequence[int], batch: int, seed: int, steps: int, guidance: float
) -> dict[str, Any]:
    """Keyword arguments of `gather` and of `calibrate`.

    Args:
        pipe: a demo pipeline, or a packed copy.
        labels: digits, one for each image.
        batch: of them in a call.
        seed: of the noise.
        steps: of a model of classes; of one whose folder says how it is called, at most.
        guidance: of a model of classes; the other has its own.
    """
    saved = saved_call(pipe)
    if not saved:
        return {
            "labels": labels, "batch": batch, "seed": seed, "steps": steps, "guidance": guidance,
        }  # fmt: skip
    entries = [
        {
            "prompt": [DIGIT_NAMES[label] for label in labels[start : start + batch]],
            "num_inference_steps": min(steps, saved["num_inference_steps"]),
            "seed": [splitmix64(seed, i) for i in range(start, min(start + batch, len(labels)))],
        }
        for start in range(0, len(labels), batch)
    ]
    return {"inputs": entries, "seed": seed}

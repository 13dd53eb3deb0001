"""Asks a demo pipeline for digits: by class labels or by prompts, guided."""

from __future__ import annotations

from typing import Any

import torch

from ditq_converters.demo.digits import DIGIT_NAMES
from ditq_converters.demo.flow.pipeline import CALL
from ditq_converters.demo.flow.text import NO_PROMPT


def call_arguments(pipe: Any, labels: list[int], guidance: float) -> dict[str, Any]:
    """The keyword arguments by which a demo pipeline draws digits.

    Args:
        pipe: a `DiTPipeline` or a `FluxPipeline`.
        labels: digits, one for each image.
        guidance: weight of classifier-free guidance (arXiv:2207.12598); 1 is none.
    """
    if hasattr(pipe, "get_label_ids"):
        return {"class_labels": labels, "guidance_scale": guidance}
    prompts = [DIGIT_NAMES[label] for label in labels]
    saved = {**CALL, "prompt": prompts, "negative_prompt": [NO_PROMPT] * len(labels)}
    del saved["num_inference_steps"]
    return {**saved, "true_cfg_scale": guidance}


def draw_digits(
    pipe: Any, labels: torch.Tensor, steps: int, guidance: float, generator: torch.Generator
) -> torch.Tensor:
    """Draw digits with a demo pipeline, or with a packed copy of one.

    Args:
        pipe: a `DiTPipeline` or a `FluxPipeline`; its progress bar is switched off.
        labels: [N] integers in 0..9.
        steps: of the pipeline's sampler.
        guidance: weight of classifier-free guidance; 1 is none.
        generator: of the initial noise.

    Returns:
        [N, 1, 32, 32] in [-1, 1], for `ditq_converters.demo.classifier.score`.
    """
    pipe.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipe(
        **call_arguments(pipe, labels.tolist(), guidance),
        num_inference_steps=steps,
        generator=generator,
        output_type="pt",
    ).images
    return images * 2 - 1

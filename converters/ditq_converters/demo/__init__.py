"""Two small trained models that ship with ditq: handwritten digits, in real pipelines.

`demo:digits` is a DiT that takes class labels and predicts noise (`architecture`, `pipeline`);
`demo:digits-flow` a Flux that takes prompts and predicts velocities (`flow`). Copies of both have
planted outlier channels (`salience`). `train` makes their weights, `drawing` asks either for digits
and `evaluate` scores them; figures stand in `assets/README.md`.

Importing this package is cheap: torch and diffusers load on first use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["DEMO_MODELS", "export_demo", "open_demo"]

DEMO_MODELS = (
    "demo:digits",
    "demo:digits-salient",
    "demo:digits-asymmetric",
    "demo:digits-flow",
    "demo:digits-flow-salient",
    "demo:digits-flow-asymmetric",
)


def open_demo(name: str) -> DiffusionPipeline:
    """Build a demo pipeline in memory, from the packaged weights; no network.

    Args:
        name: "demo:digits" or "demo:digits-flow", the models as they were trained; with "-salient",
            the same function with planted outlier channels; with "-asymmetric", which adds channels
            far from zero to those (see `ditq_converters.demo.salience`).

    Returns:
        A pipeline (fp32, CPU) that draws [N, 32, 32] greyscale images: a `DiTPipeline` for class
        labels 0..9; or a `FluxPipeline` for prompts like "seven", which takes guidance as
        `true_cfg_scale` with `negative_prompt=""`.

    Raises:
        ValueError: there is no demo model of that name.
        ImportError: the flow model's text encoders need transformers, which is not installed.
    """
    from ditq_converters.demo import pipeline

    return pipeline.open_demo(name)


def export_demo(name: str, folder: str | os.PathLike[str]) -> Path:
    """Write a demo model as a pipeline folder that `DiffusionPipeline.from_pretrained` loads.

    The folder appears complete or not at all. The DiT's also holds the digits' names, which
    `save_pretrained` would leave out; the Flux's, in `ditq/call.json`, the size, steps and guidance
    that it was trained with, which ditq's commands take. diffusers does not read that: ask it for
    `height=32, width=32`.

    Args:
        name: one of `DEMO_MODELS`.
        folder: where to; must not exist, or be empty.

    Returns:
        The folder.

    Raises:
        ValueError: there is no demo model of that name.
        FileExistsError: `folder` is a file, or a folder with something in it.
    """
    from ditq_converters.demo import pipeline

    return pipeline.export_demo(name, folder)

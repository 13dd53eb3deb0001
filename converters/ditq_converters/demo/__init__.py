"""A small trained DiT that ships with ditq: handwritten digits, in a real DiTPipeline.

Importing this package is cheap: torch and diffusers load on first use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiTPipeline

__all__ = ["DEMO_MODELS", "export_demo", "open_demo"]

DEMO_MODELS = ("demo:digits", "demo:digits-salient", "demo:digits-asymmetric")


def open_demo(name: str) -> DiTPipeline:
    """Build a demo pipeline in memory, from the packaged weights; no network.

    Args:
        name: "demo:digits", the model as it was trained; "demo:digits-salient", the same function
            with planted outlier channels; or "demo:digits-asymmetric", which adds channels far
            from zero to those (see `ditq_converters.demo.salience`).

    Returns:
        A `DiTPipeline` (fp32, CPU) for class labels 0..9, drawing [N, 32, 32] greyscale images.

    Raises:
        ValueError: there is no demo model of that name.
    """
    from ditq_converters.demo import pipeline

    return pipeline.open_demo(name)


def export_demo(name: str, folder: str | os.PathLike[str]) -> Path:
    """Write a demo model as a pipeline folder that `DiTPipeline.from_pretrained` loads.

    The folder appears complete or not at all. It also holds the digits' names, which
    `save_pretrained` would leave out.

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

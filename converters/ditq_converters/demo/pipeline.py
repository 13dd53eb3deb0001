"""Opens the demo models in their pipelines, and exports them as folders that stock diffusers loads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditq_converters.demo import DEMO_MODELS
from ditq_converters.demo.architecture import build_scheduler, build_transformer, expand
from ditq_converters.demo.bundle import DIGITS_FILE, load_asset
from ditq_converters.demo.digits import DIGIT_NAMES
from ditq_converters.demo.flow.pipeline import load_flow
from ditq_converters.demo.identity_vae import build_identity_vae
from ditq_converters.demo.salience import plant, plant_asymmetry
from ditq_converters.pipeline_folder import write_pipeline
from ditq_runtime.files import check_new

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel

ID2LABEL = {str(digit): name for digit, name in enumerate(DIGIT_NAMES)}


def load_transformer(folder: Path | None = None) -> DiTTransformer2DModel:
    """Load the trained transformer (fp32, eval mode).

    Args:
        folder: where to look; by default the assets that are installed with this package.
    """
    transformer = build_transformer()
    state = expand(load_asset(DIGITS_FILE, folder))
    transformer.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return transformer


def open_digits() -> DiTPipeline:
    """The DiT in its pipeline."""
    from diffusers import DiTPipeline

    return DiTPipeline(
        load_transformer(), build_identity_vae(), build_scheduler(), id2label=ID2LABEL
    )


TRAINED: dict[str, Callable[[], DiffusionPipeline]] = {
    "demo:digits": open_digits,
    "demo:digits-flow": load_flow,
}
PLANT: dict[str, Callable[[Any], Any]] = {"salient": plant, "asymmetric": plant_asymmetry}


def open_demo(name: str) -> DiffusionPipeline:
    """See `ditq_converters.demo.open_demo`."""
    if name not in DEMO_MODELS:
        raise ValueError(f"unknown demo model {name!r}; choose one of: {', '.join(DEMO_MODELS)}")
    if name in TRAINED:
        return TRAINED[name]()
    trained, _, planted = name.rpartition("-")
    pipe = TRAINED[trained]()
    PLANT[planted](pipe.transformer)
    return pipe


def export_demo(name: str, folder: str | os.PathLike[str]) -> Path:
    """See `ditq_converters.demo.export_demo`."""
    target = Path(folder)
    check_new(target)
    write_pipeline(open_demo(name), target)
    return target

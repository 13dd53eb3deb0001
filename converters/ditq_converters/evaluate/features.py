"""Frechet distance between the samples of two models, on any features; refused where samples are too few."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ditq_converters.demo.frechet import feature_statistics, frechet_distance

SAMPLES_PER_DIMENSION = 10
Features = Callable[[torch.Tensor], torch.Tensor]


def latent_pool4(latents: torch.Tensor) -> torch.Tensor:
    """Final latents [S, C, H, W] averaged to 4x4 cells per channel: features [S, 16 C] fp64 that need no weights."""
    return F.adaptive_avg_pool2d(latents.double(), 4).flatten(1)


def frechet(
    name: str, reference: torch.Tensor, features: torch.Tensor, fewest: int | None = None
) -> dict[str, Any]:
    """FD[name] of two sets of features; see `ditq_converters.demo.frechet` for the formula.

    With few samples the distance is biased far upwards (two equal 64-d Gaussians: 11 at 200 samples, 1.1 at 2000), so
    at or below SAMPLES_PER_DIMENSION * D samples there is a warning instead of a number.

    Args:
        name: of the features. It is not called FID: that is one network, one data set and a stated count.
        reference: [S, D] float, of the float model's samples.
        features: [S, D] float, of the packed model's.
        fewest: samples that a published convention is content with, instead; its numbers compare at equal S only.

    Returns:
        {"name", "samples", "dimension", "value": float or None, "warning": sentence or None}.
    """
    samples, dimension = features.shape
    figures: dict[str, Any] = {
        "name": f"FD-{name}",
        "samples": samples,
        "dimension": dimension,
        "value": None,
        "warning": None,
    }
    needed = SAMPLES_PER_DIMENSION * dimension + 1 if fewest is None else fewest
    if samples < needed:
        figures["warning"] = (
            f"FD-{name} is biased far upwards with few samples: {dimension} dimensions need at least {needed}, "
            f"got {samples}"
        )
        return figures
    figures["value"] = frechet_distance(feature_statistics(reference), feature_statistics(features))
    return figures


def load_features(spec: str) -> tuple[str, Features]:
    """Import a feature extractor: a function of images [S, C, H, W] fp32 in [-1, 1] that returns [S, D] float.

    Args:
        spec: `module:function`.

    Returns:
        The function's name, and the function.

    Raises:
        ValueError: it is written differently, cannot be imported, or is not there.
    """
    module, separator, function = spec.partition(":")
    if not (module and separator and function):
        raise ValueError(f"--features: expected module:function, got {spec!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--features: {spec} cannot be imported ({error})") from error
    if not callable(found):
        raise ValueError(f"--features: {spec} is no function but a {type(found).__name__}")
    return function, found


def checked_features(name: str, extract: Features, images: torch.Tensor) -> torch.Tensor:
    """Features [S, D] of images [S, C, H, W]; ValueError if the function returns anything else."""
    with torch.no_grad():
        features = extract(images)
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(images):
        shape = (
            tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        )
        raise ValueError(f"--features: {name} must return a tensor [{len(images)}, D], got {shape}")
    return features.detach().cpu()

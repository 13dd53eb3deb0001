"""Score final latents and images: paired with the float model's, and as a set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ditq_converters.demo.digits import DIGIT_NAMES
from ditq_converters.evaluate.features import (
    Features,
    checked_features,
    frechet,
    latent_pool4,
    load_features,
)
from ditq_converters.evaluate.inception import (
    FEWEST,
    NAME,
    Inception,
    inception_scores,
    load_inception,
)
from ditq_converters.evaluate.judges import load_lpips
from ditq_converters.evaluate.paired import WINDOW, pooled_psnr_db, psnr_db, relative_l2, ssim

SETS = ("float", "packed")
NO_IMAGES = "neither model is a pipeline with a VAE, so images are not scored"


@dataclass(frozen=True)
class Judges:
    """Scores that somebody asked for by name.

    Attributes:
        features: (name, function) of each feature extractor.
        lpips: of two sets of images; None if not asked for.
        inception: the network behind FID and its kin; None if not asked for.
    """

    features: tuple[tuple[str, Features], ...] = ()
    lpips: Callable[[torch.Tensor, torch.Tensor], float] | None = None
    inception: Inception | None = None

    @classmethod
    def load(cls, features: str, lpips: bool, fid: bool, pipe: Any) -> Judges:
        """Import them before the long work.

        Raises:
            ValueError: a wrong `features`, or there will be no images to judge.
            ImportError: a package is missing.
            FileNotFoundError: a judge's trained weights are.
        """
        if (features or lpips or fid) and getattr(pipe, "vae", None) is None:
            raise ValueError(
                f"evaluate: features, lpips and fid judge images, but {NO_IMAGES}; give a pipeline folder"
            )
        extractors = [load_features(features)] if features else []
        return cls(
            tuple(extractors),
            load_lpips() if lpips else None,
            load_inception() if fid else None,
        )


def judge(
    pipe: Any,
    latents: dict[str, torch.Tensor] | None,
    images: dict[str, torch.Tensor] | None,
    labels: tuple[int, ...],
    judges: Judges,
) -> dict[str, Any]:
    """The report's entries "latents", "images", "frechet", "inception", "demo" and "notes", JSON-safe.

    Args:
        pipe: whose class names tell a digits model.
        latents: "float" and "packed" -> final latents [S, ...]; or None.
        images: the same, decoded; or None.
        labels: class of each sample, of a class-conditional model.
        judges: what was asked for besides.
    """
    distances, inception, plain = [], None, {k: as_images(v) for k, v in (latents or {}).items()}
    if plain:
        reference, packed = (latent_pool4(plain[k]) for k in SETS)
        distances.append(frechet("latent_pool4", reference, packed))
    if images is not None:
        distances += _own_features(images, judges)
        inception, more = _inception(images, judges)
        distances += more
    return {
        "latents": {"relative_l2": relative_l2(plain["float"], plain["packed"]) if plain else None},
        "images": None if images is None else _paired(images, judges),
        "frechet": distances,
        "inception": inception,
        "demo": {k: score_digits(v, labels) for k, v in plain.items()}
        if is_digits(pipe) and plain and labels
        else None,
        "notes": ([] if images is not None else [NO_IMAGES])
        + [d["warning"] for d in distances if d["warning"]],
    }


def as_images(latents: torch.Tensor) -> torch.Tensor:
    """Latents of any shape as [S, C, H, W]: frames of a video are channels, tokens an image of one channel."""
    if latents.dim() == 3:
        return latents[:, None]
    return latents.flatten(1, -3) if latents.dim() > 4 else latents


def _own_features(images: dict[str, torch.Tensor], judges: Judges) -> list[dict[str, Any]]:
    distances = []
    for name, extract in judges.features:
        reference, packed = (checked_features(name, extract, images[k]) for k in SETS)
        distances.append(frechet(name, reference, packed))
    return distances


def _inception(
    images: dict[str, torch.Tensor], judges: Judges
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    if judges.inception is None:
        return None, []
    reference, packed = (judges.inception(images[k]) for k in SETS)
    distances = [
        frechet(NAME, reference.pool, packed.pool, FEWEST),
        frechet(f"{NAME}-spatial", reference.spatial, packed.spatial, FEWEST),
    ]
    return inception_scores(reference, packed), distances


def _paired(images: dict[str, torch.Tensor], judges: Judges) -> dict[str, float | None]:
    reference, others = images["float"], images["packed"]
    large = min(reference.shape[-2:]) >= WINDOW
    return {
        "psnr_db": _finite(pooled_psnr_db(reference, others)),
        "psnr_mean_of_images_db": _finite(float(psnr_db(reference, others).mean())),
        "ssim": float(ssim(reference, others).mean()) if large else None,
        "lpips": judges.lpips(reference, others) if judges.lpips else None,
    }


def is_digits(pipe: Any) -> bool:
    """Whether a pipeline draws the built-in digits, which the built-in classifier can judge."""
    labels = getattr(pipe, "labels", {})
    return labels == {name: digit for digit, name in enumerate(DIGIT_NAMES)} and (
        pipe.transformer.config.sample_size,
        pipe.transformer.config.in_channels,
    ) == (8, 1)


def score_digits(latents: torch.Tensor, labels: tuple[int, ...]) -> dict[str, float | None]:
    """Accuracy, mean probability of the right digit, and digit-FD to the real digits, of latents [S, 1, 8, 8].

    digit-FD is None where its 64 features have a singular covariance: below 65 samples.
    """
    from ditq_converters.demo.classifier import FEATURES, score

    result = score(latents.clamp(-1, 1), torch.tensor(labels))
    return {
        "accuracy": result.accuracy,
        "mean_probability": result.mean_probability,
        "digit_fd": result.digit_fd if len(labels) > FEATURES else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

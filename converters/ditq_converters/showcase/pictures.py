"""Every image of the demo folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ditq_converters.evaluate import plots
from ditq_converters.showcase.records import Study
from ditq_runtime.cli.drawing import to_pil
from ditq_runtime.cli.images import grid

SHOWN = 40  # samples per model in a grid
SITES = ("qkv", "o_proj", "fc1", "fc2")


def write_pictures(out: Path, studies: dict[str, Study]) -> None:
    """Sample grids and plots for all studies."""
    digits, salient = studies["digits"], studies["salient"]
    for name, study in studies.items():
        write_samples(out, study, name)
    for key, title in (
        ("sqnr_free", "each on its own trajectory"),
        ("sqnr_forced", "on the float model's latents"),
    ):
        for name, study in studies.items():
            curves = {n: v[key]["mean_of_ratios_db"] for n, v in study.figures["variants"].items()}
            model = study.figures["model"]
            plots.sqnr_curves(
                out / f"{key.replace('_', '-')}-{name}.png", curves, f"{model}, {title}"
            )
    for name, (layers, errors) in digits.layers.items():
        title = f"{name}: error of linears (not V, not modulation), cascade"
        plots.layer_heatmap(out / f"layers-{name.lower()}.png", layers, errors, title)
    sizes = digits.figures["bytes"]
    plots.stacked_sizes(out / "sizes.png", sizes, "demo:digits, transformer on disk")
    for study, name in ((digits, "digits"), (salient, "salient")):
        write_ranges(out, study, name)


def write_ranges(out: Path, study: Study, name: str) -> None:
    """Activation ranges over channels and steps, as the papers show them."""
    block = "transformer_blocks.2"
    panels = {site: absmax(study, f"{block}.{site}") for site in SITES}
    model = study.figures["model"]
    plots.activation_ranges(
        out / f"activations-{name}.png", panels, f"{model}, {block}: range of every channel"
    )
    drift = {site: values.amax(1) for site, values in panels.items()}
    plots.range_drift(
        out / f"drift-{name}.png",
        drift,
        f"{model}, {block}: range of each linear input over sampling",
    )


def absmax(study: Study, site: str) -> torch.Tensor:
    """[T, K] largest |x| of a site."""
    low, high = study.stats.ranges(site)
    return torch.maximum(low.abs(), high.abs())


def write_samples(out: Path, study: Study, name: str) -> None:
    """One grid per model, same seeds at the same places."""
    for model, images in study.samples.items():
        tiles = to_pil(images[:SHOWN])
        grid(tiles, columns=8).save(out / sample_name(name, model))


def sample_name(study: str, model: str) -> str:
    """The file of a model's grid."""
    return f"samples-{study}-{model.lower().replace(' ', '-')}.png"

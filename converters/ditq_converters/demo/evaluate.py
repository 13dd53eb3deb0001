"""Scores the packaged demo models: `python -m ditq_converters.demo.evaluate --samples 500`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

from ditq_converters.demo import DEMO_MODELS, open_demo
from ditq_converters.demo.classifier import Score, score
from ditq_converters.demo.drawing import draw_digits

BATCH_SIZE = 100


def sample(
    name: str, count: int, steps: int, guidance: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the digits 0, 1, ... 9, 0, ... with a demo pipeline.

    Returns:
        images: [count, 1, 32, 32] fp32 in [-1, 1]. labels: [count] int64.
    """
    pipe = open_demo(name)
    labels = torch.arange(count) % 10
    generator = torch.Generator().manual_seed(seed)
    images = [
        draw_digits(pipe, batch, steps, guidance, generator)
        for batch in track(labels.split(BATCH_SIZE), description=name)
    ]
    return torch.cat(images), labels


def save_grid(images: torch.Tensor, path: Path, columns: int = 10) -> None:
    """Write images [N, 1, H, W] in [-1, 1] as one PNG, row by row, with grey lines between."""
    from PIL import Image

    framed = F.pad(images[: len(images) // columns * columns, 0], (4, 4, 4, 4), value=-0.5)
    rows = framed.unflatten(0, (-1, columns))
    grid = rows.permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1)  # [rows * (H+8), columns * (W+8)]
    pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().numpy().astype(np.uint8)
    Image.fromarray(pixels).save(path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m ditq_converters.demo.evaluate")
    parser.add_argument("--models", nargs="+", choices=DEMO_MODELS, default=DEMO_MODELS)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--grid", type=Path, help="write the first 100 samples of the first model here"
    )
    arguments = parser.parse_args()

    table = Table("model", "accuracy", "mean probability", "digit_fd")
    for name in arguments.models:
        images, labels = sample(
            name, arguments.samples, arguments.steps, arguments.cfg, arguments.seed
        )
        result: Score = score(images, labels)
        cells = (result.accuracy, result.mean_probability, result.digit_fd)
        table.add_row(name, *(f"{cell:.4f}" for cell in cells))
        if arguments.grid and name == arguments.models[0]:
            save_grid(images[:100], arguments.grid)
    Console().print(table)


if __name__ == "__main__":
    main()

"""Arrange images in a grid."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def grid(images: Sequence[Image.Image], columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """Images of one size, row by row on a mid-grey ground.

    Args:
        images: at least one; all of the size of the first.
        columns: images per row.
        scale: integer enlargement, nearest neighbour.
        gap: pixels between images.
    """
    if not images:
        raise ValueError("grid: at least one image is needed, got none")
    width, height = (side * scale for side in images[0].size)
    rows = -(-len(images) // columns)
    mode = images[0].mode if images[0].mode in ("L", "RGB") else "RGB"
    ground = 128 if mode == "L" else (128, 128, 128)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new(mode, size, ground)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        tile = image.convert(mode).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (column * (width + gap), row * (height + gap)))
    return sheet

"""Figures that can be read on a phone: their width, their letters, and titles that fit."""

from __future__ import annotations

import textwrap
from typing import Any

import matplotlib

WIDTH = 5.2  # inches: a page of 400 pixels shows it at 70 per inch, so that 8 points are 8 pixels
SMALLEST = 8  # points
DOTS = 200  # per inch, of the file
TITLE = 56  # characters in a line of a title
FONTS: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": SMALLEST,
    "xtick.labelsize": SMALLEST, "ytick.labelsize": SMALLEST, "figure.titlesize": 10,
}  # fmt: skip
in_our_fonts: Any = matplotlib.rc_context(FONTS)


def wrapped(title: str) -> str:
    """A title in lines that fit."""
    return textwrap.fill(title, TITLE)

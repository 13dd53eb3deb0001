"""A candidate has one colour in every figure of every report."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable

FIXED = {
    "float": "#555555",
    "W8A8": "#4477aa",
    "W4A8": "#ee6677",
    "W4A8 data-free": "#ee9944",
    "W4A8 gptq": "#aa3377",
    "free": "#4477aa",
    "forced": "#aa3377",
    # planted model: blue for 8 bits, red for 4; light without smoothing, dark with it
    "W8A8 static linear": "#a6cee3",
    "W8A8 static smoothquant": "#1f78b4",
    "W8A8 token linear": "#b2df8a",
    "W8A8 token smoothquant": "#33a02c",
    "W4A8 static linear": "#fb9a99",
    "W4A8 static smoothquant": "#e31a1c",
    "W4A8 token linear": "#fdbf6f",
    "W4A8 token smoothquant": "#ff7f00",
    # sizes on disk
    "block weights": "#4477aa",
    "modulation weights": "#66ccee",
    "group scales and offsets": "#aa3377",
    "channel and activation scales": "#ccbb44",
    "biases": "#228833",
    "low-rank branches": "#ee9944",
    "folds": "#774411",
    "timestep and label embedder": "#ee6677",
    "other float": "#999999",
    "file headers": "#000000",
    # methods
    "auto": "#000000",
    "linear": "#bbbb99",
    "smoothquant": "#4477aa",
    "smoothquant, nearest": "#ccbb44",
    "on the fly": "#eecc22",
    "osplus": "#66ccee",
    "meta": "#999999",
    "ditas": "#aa3377",
    "ptq4dit": "#228833",
    "htg": "#ee6677",
    # benches
    "torch fp32": "#bbbbbb",
    "torch bf16": "#777777",
    "torch fp32 linear": "#bbbbbb",
    "torch bf16 linear": "#777777",
    "torch fp32 attention": "#ddccbb",
    "torch bf16 attention": "#998877",
    "ditq W8A8": "#4477aa",
    "ditq W4A8": "#ee6677",
    "ditq W4A8 per group": "#aa3377",
}
OTHERS = (
    "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee9944", "#774411", "#4477aa", "#ee6677", "#117733",
    "#88ccee", "#882255", "#999933", "#332288", "#cc99bb", "#aacc77", "#555500", "#ffcc99", "#0099aa",
)  # fmt: skip
TURN = 0.618  # of the colour circle: the next hue lies in the widest gap


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """Name -> colour, each another one: its own where no name before has it, else the next that is free."""
    names = list(dict.fromkeys(names))
    found: dict[str, str] = {}
    for name in names:
        if name in FIXED and FIXED[name] not in found.values():
            found[name] = FIXED[name]
    free = (colour for colour in (*OTHERS, *_more()) if colour not in found.values())
    for name in names:
        if name not in found:
            found[name] = next(free)
    return {name: found[name] for name in names}


def _more() -> list[str]:
    """Fifty more colours, for figures of very many names."""
    parts = (colorsys.hsv_to_rgb(at * TURN % 1, 0.45 + 0.4 * (at % 2), 0.85) for at in range(50))
    return ["#" + "".join(f"{round(255 * part):02x}" for part in rgb) for rgb in parts]

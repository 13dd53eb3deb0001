"""A debug switch, DITQ_CHECK_NAN=1: NaN in what static scales are about to quantize is refused.

A code cannot be NaN. With scales computed as it runs a NaN makes the scale NaN and shows in the whole row; with static
scales it becomes an ordinary code, and what was NaN is a wrong number. To look costs one more pass over the input and
waits for the GPU at every layer, so that it is off unless somebody searches for a NaN; while it is on, no GEMM leaves
codes, since nobody could look at what they were made of.
"""

from __future__ import annotations

import os

import torch

SWITCH = "DITQ_CHECK_NAN"
ON = os.environ.get(SWITCH) == "1"  # read once: code that is compiled does not look


def refuse_nan(values: torch.Tensor, who: object) -> None:
    """ValueError if there is a NaN among values that `who` is about to quantize."""
    if bool(values.isnan().any()):
        raise ValueError(
            f"{SWITCH}: NaN in the input {list(values.shape)} of {who}, whose static scales would make it a number; "
            "the layer before it, or the input of the model, is where to look"
        )

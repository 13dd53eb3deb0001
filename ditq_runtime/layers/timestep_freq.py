"""The two frequency tables of DiT's timestep embedding; a checkpoint must say which one it was trained with.

`dit`: exp(-ln(10000) i / 128), as the DiT paper's code computes it (arXiv:2212.09748); `diffusers`: i / 127 instead,
what diffusers' DiTTransformer2DModel computes for every DiT, also for weights that were trained with the other table.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditq_runtime.format.scheme import SHIFT_OF


def get_timestep_freq(model: nn.Module) -> str:
    """`dit` for a DiT whose timestep embeddings were switched, `diffusers` for anything else."""
    return "dit" if any(m.downscale_freq_shift == 0 for m in _projections(model)) else "diffusers"


def set_timestep_freq(model: nn.Module, mode: str) -> None:
    """Make a DiT compute its timestep embeddings as `mode` says, in place.

    Raises:
        ValueError: an unknown mode, or `dit` for a model that is no DiT.
    """
    if mode not in SHIFT_OF:
        raise ValueError(f"timestep_freq must be one of {', '.join(SHIFT_OF)}, got {mode!r}")
    projections = _projections(model)
    if mode == "dit" and not projections:
        raise ValueError(
            f"timestep_freq 'dit' is for DiTTransformer2DModel, not {type(model).__name__}"
        )
    for projection in projections:
        projection.downscale_freq_shift = SHIFT_OF[mode]


def _projections(model: nn.Module) -> list[Any]:
    if type(model).__name__ != "DiTTransformer2DModel":
        return []
    return [m for name, m in model.named_modules() if name.endswith("norm1.emb.time_proj")]

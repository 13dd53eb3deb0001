"""What a linear should be rounded to, where it reads other inputs than the float model's: least squares, held out."""

from __future__ import annotations

import torch

from ditq_converters.convert.gptq import damped

DAMPINGS = (0.01, 0.1, 1.0)  # of the mean of the diagonal of X'^T X'; beside them no change at all
JUDGED = 64  # outputs that a damping is judged by, evenly spaced


def aimed(
    weight: torch.Tensor, wanted: torch.Tensor, seen: torch.Tensor, damping: float | None
) -> torch.Tensor:
    """The weight that makes of the inputs it sees what the float layer makes of its own.

    argmin over V of |X W^T - X' V^T|^2 + lambda |V - W|^2 = W + W (X - X')^T X' (X'^T X' + lambda I)^-1, with X the
    float model's inputs and X' those that the quantized layers before this one leave. Least squares; the target that
    layer-wise reconstruction takes when it keeps the float model's outputs (as BRECQ does, arXiv:2102.05426, Eq. 10).

    Args:
        weight: [N, K] fp64, W.
        wanted: [R, K] fp64, X.
        seen: [R, K] fp64, X', row by row the same tokens.
        damping: lambda in units of the mean of the diagonal of X'^T X'; None: without bound, so that V = W.

    Returns:
        [N, K] fp64.
    """
    if damping is None:
        return weight
    asked = seen.T @ ((wanted - seen) @ weight.T)
    return weight + torch.cholesky_solve(asked, _factor(seen.T @ seen, damping)).T


def best_damping(
    weight: torch.Tensor, wanted: torch.Tensor, seen: torch.Tensor, half: torch.Tensor
) -> float | None:
    """The damping of `aimed` that does best on samples that it was not fitted to.

    What a few thousand rows say about how the error of earlier layers follows from an input is noise in part, the more
    so the smaller the error: without this, 8-bit weights end worse aimed than not.

    Args:
        weight: as in `aimed`; judged are JUDGED of its outputs.
        wanted: as in `aimed`.
        seen: as in `aimed`.
        half: [R] bool, rows of one half of the samples; each half is judged by what is fitted to the other.

    Returns:
        One of DAMPINGS, or None for no change.
    """
    few = weight[torch.linspace(0, len(weight) - 1, min(JUDGED, len(weight))).round().long()].T
    losses = dict.fromkeys((None, *DAMPINGS), 0.0)
    for judged in (half, ~half):
        fitted = ~judged
        error = (wanted[judged] - seen[judged]) @ few
        asked = seen[fitted].T @ ((wanted[fitted] - seen[fitted]) @ few)
        losses[None] += float(error.square().sum())
        gram = seen[fitted].T @ seen[fitted]
        for damping in DAMPINGS:
            change = torch.cholesky_solve(asked, _factor(gram, damping))
            losses[damping] += float((error - seen[judged] @ change).square().sum())
    return min(losses, key=lambda damping: losses[damping])


def _factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Cholesky factor of X'^T X' + lambda I, from X'^T X' [K, K]."""
    return torch.linalg.cholesky(damped(gram, damping))

"""Error-compensating rounding: GPTQ (Frantar et al., arXiv:2210.17323, Alg. 1).

Columns are rounded one after another; what one loses, the columns still to come make up for, so that the error of the
output on sampled inputs is small rather than that of the weight. We depart from the paper in one thing: scales are
those that rounding to nearest found, fixed before the first column (the paper's code takes a group's scales from the
updated weights when it reaches the group). So both roundings share every scale, and differ in codes alone.
"""

from __future__ import annotations

from typing import Protocol

import torch

DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper (section 3.3)
BLOCK = 128  # columns between two updates of all that follow


class Grid(Protocol):
    """A weight format with its scales fixed: `ditq_kernels.W8` and the others."""

    def nearest(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of values [N] fp32 in one column, and the real values [N] that they stand for."""
        ...


def error_feedback(rows: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of H = X^T X + lambda I: how an error spreads to later columns.

    Args:
        rows: [R, K] fp64, X: inputs of the linear, as it sees them but for their rounding.
        damping: lambda in units of the mean of the diagonal of X^T X; it keeps H regular when R < K.

    Returns:
        [K, K] fp64, upper triangular.
    """
    hessian = rows.T @ rows
    mean = float(hessian.diagonal().mean())
    hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)  # inputs that are all zero: any
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def compensated_codes(weight: torch.Tensor, feedback: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round a weight column by column, each error passed on to the columns that follow (Alg. 1).

    With a diagonal Hessian (inputs without correlation) nothing is passed on: the codes are the nearest.

    Args:
        weight: [N, K] float, what the codes should stand for.
        feedback: [K, K] fp64 of `error_feedback`.
        grid: rounds one column.

    Returns:
        [N, K], codes of the grid.
    """
    weight, codes = weight.double().clone(), []
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        errors = []
        for column in range(start, stop):
            wanted = weight[:, column]
            code, real = grid.nearest(wanted.float(), column)
            error = (wanted - real.double()) / feedback[column, column]
            weight[:, column + 1 : stop] -= torch.outer(error, feedback[column, column + 1 : stop])
            codes.append(code)
            errors.append(error)
        weight[:, stop:] -= torch.stack(errors, dim=1) @ feedback[start:stop, stop:]
    return torch.stack(codes, dim=1)

"""Error-compensating rounding: GPTQ (Frantar et al., arXiv:2210.17323, Alg. 1).

Columns are rounded one after another; what one loses, the columns still to come make up for, so that the error of the
output on sampled inputs is small rather than that of the weight. We depart from the paper in two things. Scales are
those that rounding to nearest found, fixed before the first column (the paper's code takes a group's scales from the
updated weights when it reaches the group): both roundings share every scale, and differ in codes alone. And columns go
by falling energy of their inputs, as the authors' code offers under the name act-order, so that the columns which
matter most are rounded while the most others can still make up for them; with fixed scales that needs no reordering of
groups, and nothing of it is left in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper (section 3.3)
BLOCK = 128  # columns between two updates of all that follow


class Grid(Protocol):
    """A weight format with its scales fixed: `ditq_kernels.W8` and the others."""

    def nearest(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of values [N] fp32 in one column, and the real values [N] that they stand for."""
        ...


@dataclass(frozen=True)
class Feedback:
    """How the error of one column spreads to those that are rounded after it.

    Attributes:
        order: [K] int64, the columns in the order in which they are rounded.
        upper: [K, K] fp64, upper triangular in that order.
    """

    order: torch.Tensor
    upper: torch.Tensor

    @property
    def importance(self) -> torch.Tensor:
        """[K] what a squared error of a column still costs when all later columns have made up for it, mean 1.

        Errors e of `compensated_codes` leave the loss sum over columns of (e / upper[p, p])^2.
        """
        cost = torch.empty_like(self.upper.diagonal())
        cost[self.order] = self.upper.diagonal() ** -2
        return cost / cost.mean()


def error_feedback(
    rows: torch.Tensor, damping: float = DAMPING, *, ordered: bool = True, centred: bool = False
) -> Feedback:
    """The upper Cholesky factor of the inverse of H = X^T X + lambda I: how an error spreads to later columns.

    Args:
        rows: [R, K] fp64, X: inputs of the linear, as it sees them but for their rounding.
        damping: lambda in units of the mean of the diagonal of X^T X; it keeps H regular when R < K.
        ordered: columns by falling diagonal of H, equal ones from left to right; otherwise from left to right.
        centred: take the mean from X first, where a bias will take back the mean error of the output: the codes then
            need not care for it.

    Returns:
        The order of the columns and the factor.
    """
    if centred:
        rows = rows - rows.mean(dim=0)
    hessian = damped(rows.T @ rows, damping)
    order = torch.arange(len(hessian))
    if ordered:
        order = hessian.diagonal().sort(descending=True, stable=True).indices
        hessian = hessian[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return Feedback(order, torch.linalg.cholesky(inverse, upper=True))


def damped(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """H + lambda I [K, K], lambda in units of the mean of its diagonal; inputs that are all zero get any."""
    mean = float(hessian.diagonal().mean())
    return hessian + (damping * mean if mean > 0 else 1.0) * torch.eye(
        len(hessian), dtype=hessian.dtype
    )


def compensated_codes(weight: torch.Tensor, feedback: Feedback, grid: Grid) -> torch.Tensor:
    """Round a weight column by column, each error passed on to the columns that follow (Alg. 1).

    With a diagonal Hessian (inputs without correlation) nothing is passed on: the codes are the nearest.

    Args:
        weight: [N, K] float, what the codes should stand for.
        feedback: of `error_feedback`.
        grid: rounds one column.

    Returns:
        [N, K], codes of the grid.
    """
    order, upper = feedback.order.tolist(), feedback.upper
    weight, codes = weight.double()[:, feedback.order], []
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        errors = []
        for place in range(start, stop):
            wanted = weight[:, place]
            code, real = grid.nearest(wanted.float(), order[place])
            error = (wanted - real.double()) / upper[place, place]
            weight[:, place + 1 : stop] -= torch.outer(error, upper[place, place + 1 : stop])
            codes.append(code)
            errors.append(error)
        weight[:, stop:] -= torch.stack(errors, dim=1) @ upper[start:stop, stop:]
    return torch.stack(codes, dim=1)[:, feedback.order.argsort()]

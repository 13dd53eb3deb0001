"""Which weights share a scale, in the papers and their code (DiTAS, arXiv:2409.07756; Meta, Alg. 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import ditq_kernels as k
from ditq_bench.simulated.rounding import RULES, asymmetric_codes

CODE_ROWS = 32  # weights that share a scale in DiTAS's released code
GRANULARITIES = (
    "per_out_channel",
    "per_in_channel",
    "per_in_channel_code",
    "per_in_channel_folded",
    "per_in_group",
    "group_k",
)


def fake_quantize_weight(
    weight: torch.Tensor, granularity: str, bits: int, rule: str = "asymmetric", size: int = 128
) -> torch.Tensor:
    """What a weight becomes.

    Args:
        weight: [N, K] float.
        granularity: who shares a range:
            `per_out_channel`: a row;
            `per_in_channel`: a column (DiTAS's text);
            `per_in_channel_code`: 32 rows at stride N / 32 of a column (what DiTAS's code does);
            `per_in_group`: `size` neighbouring columns, all rows (the closest an integer GEMM can rescale);
            `group_k`: `size` neighbouring weights of a row (Meta, Alg. 1).
        bits: 8 or 4.
        rule: a name of `rounding.RULES`.
        size: of a group, lowered to a divisor of K where it must be.

    Returns:
        [N, K], the dtype of weight.

    Raises:
        ValueError: a granularity that is unknown or does not fit the shape.
    """
    shape, shared = _layout(weight, granularity, size)
    grouped = weight.reshape(shape)
    low, high = grouped.amin(shared, keepdim=True), grouped.amax(shared, keepdim=True)
    return RULES[rule](grouped, low, high, bits).reshape(weight.shape)


def _layout(
    weight: torch.Tensor, granularity: str, size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape that shows the groups, and its dimensions along which weights share a range."""
    num_rows, in_features = weight.shape
    if granularity == "per_out_channel":
        return (num_rows, in_features), (1,)
    if granularity == "per_in_channel":
        return (num_rows, in_features), (0,)
    if granularity == "per_in_channel_code":
        if num_rows % CODE_ROWS:
            raise ValueError(
                f"per_in_channel_code: N must be a multiple of {CODE_ROWS}, got N={num_rows}; take per_in_channel"
            )
        return (CODE_ROWS, num_rows // CODE_ROWS, in_features), (0,)
    if granularity in ("per_in_group", "group_k"):
        size = k.resolve_group_size(in_features, size)
        shared = (0, 2) if granularity == "per_in_group" else (2,)
        return (num_rows, in_features // size, size), shared
    raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")


@dataclass(frozen=True)
class FoldedWeight:
    """`per_in_channel_folded`: a scale per input channel, merged into the activations before they are quantized.

    weight = (codes - zero) scale per column; activations become X scale, and the product is of integers alone. The
    scale takes up whatever smoothing did: the output does not depend on the smoothing factor.

    Attributes:
        codes: [N, K] int64.
        zero: [K] int64.
        scale: [K], the dtype of the weight.
    """

    codes: torch.Tensor
    zero: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, bits: int) -> FoldedWeight:
        """Quantize [N, K]."""
        low, high = weight.amin(0, keepdim=True), weight.amax(0, keepdim=True)
        codes, zero, scale = asymmetric_codes(weight, low, high, bits)
        return cls(codes.long(), zero[0].long(), scale[0])

    def dequantize(self) -> torch.Tensor:
        """[N, K], the weight that the codes stand for."""
        return (self.codes - self.zero) * self.scale

    def product(self, q: torch.Tensor) -> torch.Tensor:
        """sum_k q[m, k] (codes[n, k] - zero[k]), exactly: the zero points are one more row of the weight.

        Args:
            q: [M, K] integers in any dtype, activation codes less their zero point.

        Returns:
            [M, N] fp64 integers.
        """
        rows = torch.cat(
            [self.codes, self.zero[None]]
        ).double()  # fp64 sums integers exactly to 2^53
        with_zero = q.double() @ rows.T
        return with_zero[:, :-1] - with_zero[:, -1:]

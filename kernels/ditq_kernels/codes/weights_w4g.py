"""Float weights to `w4g`: int4 codes with a real scale and a zero point for each group of inputs.

The groups of the papers (Q-DiT and DiTAS, arXiv:2409.07756, asymmetric; Yang et al., An Analysis on
Quantizing Diffusion Transformers, Alg. 1, symmetric groups of 128), without a search. A GEMM must
scale the integer sum of every group by itself and add in fp32; `w4p` sums all of K in integers.
"""

from dataclasses import dataclass, replace

import torch

from ditq_kernels.codes import numerics, packing
from ditq_kernels.codes.arranged import arrange, can_arrange
from ditq_kernels.codes.packing import GROUP_MULTIPLE
from ditq_kernels.codes.weights import finite_matrix


@dataclass(frozen=True)
class W4G:
    """Int4 weights per group: `weight = scale * (code - weight_zero)`."""

    packed: torch.Tensor  # [N, K / 2] uint8, two codes a byte
    scale: torch.Tensor  # [N, J] fp32
    weight_zero: torch.Tensor  # [N, J] uint8 in 0..15

    def nearest(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Other weights on these scales: codes 0..15 of values [N] in a column, and what they stand for."""
        group = column * self.scale.shape[1] // (2 * self.packed.shape[1])
        scale, zero = self.scale[:, group], self.weight_zero[:, group]
        codes = numerics.quantize_int4(values, scale, zero)
        return codes, numerics.dequantize(codes, scale, zero.to(torch.int32))

    def with_codes(self, codes: torch.Tensor) -> "W4G":
        """The same scales with codes [N, K] of `nearest`."""
        return replace(self, packed=packing.pack_int4(codes))

    def expand(self) -> torch.Tensor:
        """The integer weights, [N, K] int8 in [-15, 15]."""
        return packing.expand_w4g(self.packed, self.weight_zero)

    def arranged(self) -> "W4G":
        """The same weights in the order that GPU kernels read, where they can be (see `codes.arranged`)."""
        parts = (self.packed, self.scale, self.weight_zero)
        if packing.is_arranged(self.scale) or not can_arrange("w4g", *parts[:2]):
            return self
        return W4G(*arrange("w4g", *parts))

    def dequantize(self) -> torch.Tensor:
        """The real weights, [N, K] fp32."""
        return dequantize_w4g(self.packed, self.scale, self.weight_zero)

    def weight_sum(self) -> torch.Tensor:
        """Sum of the integer weights of each row and group, [N, J] int32: the zero-point correction of a GEMM."""
        grouped = self.expand().unflatten(1, (self.scale.shape[1], -1))
        sums = grouped.sum(dim=2, dtype=torch.int32)
        return sums.t().contiguous().t() if packing.is_arranged(self.scale) else sums


def dequantize_w4g(
    packed: torch.Tensor, weight_scale: torch.Tensor, weight_zero: torch.Tensor
) -> torch.Tensor:
    """Real weights behind int4 codes: `weight_scale * (code - weight_zero)`, one fp32 rounding.

    Args:
        packed: [N, K / 2] uint8, two codes a byte.
        weight_scale: [N, J] fp32.
        weight_zero: [N, J] uint8 in 0..15.

    Returns:
        [N, K] fp32.

    Raises:
        ValueError: packed is no byte matrix, or J does not divide K.
    """
    steps = packing.expand_w4g(packed, weight_zero).unflatten(1, (weight_scale.shape[1], -1))
    return numerics.dequantize(steps, weight_scale[:, :, None]).flatten(1)


def fits_w4g(in_features: int, group_size: int) -> bool:
    """Whether `w4g` has this group size: a multiple of 32 that divides K, or an even K as one group."""
    if group_size <= 0 or in_features % 2:
        return False
    one_group = group_size == in_features
    return one_group or (group_size % GROUP_MULTIPLE == 0 and in_features % group_size == 0)


def quantize_weight_w4g(weight: torch.Tensor, group_size: int, symmetric: bool = False) -> W4G:
    """Int4 weights with a scale and a zero point for each group, from its smallest and largest weight.

    A row times a power of two gives the same codes and that multiple of the scales, exactly
    (as long as they stay above MIN_SCALE).

    Args:
        weight: [N, K] float, finite, K even.
        group_size: neighbouring inputs that share a scale: a multiple of 32 that divides K, or K itself.
        symmetric: codes 1..15 around the zero point 8, scale max|w| / 7; otherwise codes 0..15 for the
            range of the group, which always holds 0.

    Raises:
        ValueError: not a finite float matrix, or a group size that does not fit K.
    """
    weight = finite_matrix(weight, "quantize_weight_w4g")
    in_features = weight.shape[1]
    if not fits_w4g(in_features, group_size):
        raise ValueError(
            f"quantize_weight_w4g: group_size must be a multiple of {GROUP_MULTIPLE} that divides K, or an "
            f"even K itself, got K={in_features}, group_size={group_size}; take resolve_group_size(K, wanted)"
        )
    grouped = weight.unflatten(1, (-1, group_size))
    if symmetric:
        scale = numerics.symmetric_scale(grouped.abs().amax(dim=2), numerics.INT4_MAX)
        zero = torch.full_like(scale, numerics.INT4_ZERO, dtype=torch.uint8)
    else:
        scale, zero = numerics.asymmetric_scale_int4(grouped.amin(dim=2), grouped.amax(dim=2))
    codes = numerics.quantize_int4(grouped, scale[:, :, None], zero[:, :, None])
    return W4G(packing.pack_int4(codes.flatten(1)), scale, zero)

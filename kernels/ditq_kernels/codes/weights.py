"""Float weights to integer weights: `w8` (one scale a row) and `w4p` (two-level int4).

`w4p` is progressive quantization (QServe, arXiv:2405.04532, section 4.1): a row scale takes the
weights to int8 units, then each group of neighbouring inputs gets a 4-bit code with an integer
scale and offset, so that a GEMM expands codes to int8 and sums all of K in int32. We depart from
the paper: the offset is a free integer (not a multiple of the group scale), the int8 range is
+-127 (not +-119), and range and offset are searched per group. That gains 0.5 to 2 dB.
"""

from dataclasses import dataclass, replace

import torch

from ditq_kernels.codes import numerics, packing
from ditq_kernels.codes.arranged import arrange, can_arrange
from ditq_kernels.codes.packing import GROUP_MULTIPLE

MAX_GROUP_SCALE = 17  # 15 * 17 = 255 covers [-127, 127]
RANGE_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
OFFSET_STEPS = (0.0, -1.0, 1.0)
FINE_SHRINKS = (*RANGE_SHRINKS, 0.7, 0.65, 0.6, 0.55, 0.5)  # where columns weigh differently
FINE_STEPS = (*OFFSET_STEPS, -2.0, 2.0, -4.0, 4.0)
ROUND_TO_INTEGER = 1.5 * 2**23  # at this size fp32 has no fraction: adding it rounds, ties to even
# rows searched together: temporaries stay in cache, and below 2**15 elements torch starts no threads
# (thousands of tiny parallel regions take minutes on a busy machine)
CHUNK_ELEMENTS = 2**15 - 1


@dataclass(frozen=True)
class W8:
    """Int8 weights with one scale per output channel: `weight = scale * qweight`."""

    qweight: torch.Tensor  # [N, K] int8 in [-127, 127]
    scale: torch.Tensor  # [N] fp32

    def nearest(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Other weights on these scales: int8 codes of values [N] in any column, and what they stand for."""
        codes = numerics.quantize_symmetric(values, self.scale)
        return codes, numerics.dequantize(codes, self.scale)

    def with_codes(self, codes: torch.Tensor) -> "W8":
        """The same scales with codes [N, K] of `nearest`."""
        return replace(self, qweight=codes)

    def expand(self) -> torch.Tensor:
        """The int8 weights, [N, K]."""
        return self.qweight

    def dequantize(self) -> torch.Tensor:
        """The real weights, [N, K] fp32."""
        return numerics.dequantize(self.qweight, self.scale[:, None])

    def weight_sum(self) -> torch.Tensor:
        """Sum of each row's int8 weights, [N] int32: the zero-point correction of a GEMM."""
        return self.qweight.sum(dim=1, dtype=torch.int32)


@dataclass(frozen=True)
class W4P:
    """Progressive int4: `weight = scale * (code * group_scale + group_offset)`, bracket int8."""

    packed: torch.Tensor  # [N, K / 2] uint8, two codes a byte
    group_scale: torch.Tensor  # [N, J] uint8 in 1..17
    group_offset: torch.Tensor  # [N, J] int8
    scale: torch.Tensor  # [N] fp32

    def nearest(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Other weights on these scales: codes 0..15 of values [N] in a column, and what they stand for."""
        group = column * self.group_scale.shape[1] // (2 * self.packed.shape[1])
        scale, offset = (
            part[:, group, None].float() for part in (self.group_scale, self.group_offset)
        )
        units = values.float() * numerics.inverse_scale(self.scale)
        codes = _codes(units[:, None, None], scale, offset)[:, 0]
        real = numerics.dequantize((codes * scale + offset)[:, 0], self.scale)
        return codes[:, 0].to(torch.uint8), real

    def with_codes(self, codes: torch.Tensor) -> "W4P":
        """The same scales with codes [N, K] of `nearest`."""
        return replace(self, packed=packing.pack_int4(codes))

    def expand(self) -> torch.Tensor:
        """The int8 weights behind the codes, [N, K] in [-127, 127]."""
        return packing.expand_w4p(self.packed, self.group_scale, self.group_offset)

    def arranged(self) -> "W4P":
        """The same weights in the order that GPU kernels read, where they can be (see `codes.arranged`)."""
        parts = (self.packed, self.group_scale, self.group_offset)
        if packing.is_arranged(self.group_scale) or not can_arrange("w4p", *parts[:2]):
            return self
        packed, scale, offset = arrange("w4p", *parts)
        return W4P(packed, scale, offset, self.scale)

    def dequantize(self) -> torch.Tensor:
        """The real weights, [N, K] fp32."""
        return numerics.dequantize(self.expand(), self.scale[:, None])

    def weight_sum(self) -> torch.Tensor:
        """Sum of each row's int8 weights, [N] int32: the zero-point correction of a GEMM."""
        return self.expand().sum(dim=1, dtype=torch.int32)


def resolve_group_size(in_features: int, requested: int, one_group: bool = False) -> int:
    """Largest group size that fits: a multiple of 32 that divides K and is at most `requested`.

    Args:
        in_features: K.
        requested: the largest group wanted.
        one_group: where none fits and K is even, take all of K: a scale per output channel, as `w4g` allows.

    Raises:
        ValueError: there is none.
    """
    most = min(requested, in_features)  # none above K divides it
    start = most - most % GROUP_MULTIPLE
    for size in range(start, 0, -GROUP_MULTIPLE):
        if in_features % size == 0:
            return size
    if one_group and in_features % 2 == 0:
        return in_features
    raise ValueError(
        f"resolve_group_size: no multiple of {GROUP_MULTIPLE} up to {requested} divides "
        f"K={in_features}; keep this layer in w8, or request at least {GROUP_MULTIPLE} and pad K"
    )


def quantize_weight_w8(weight: torch.Tensor) -> W8:
    """Symmetric int8 weights with one scale per output channel.

    A row times a power of two gives the same codes and that multiple of the scale, exactly
    (as long as the scale stays above MIN_SCALE).

    Args:
        weight: [N, K] float, finite.

    Raises:
        ValueError: not a finite float matrix.
    """
    weight = finite_matrix(weight, "quantize_weight_w8")
    scale = numerics.symmetric_scale(weight.abs().amax(dim=1))
    return W8(numerics.quantize_symmetric(weight, scale[:, None]), scale)


def quantize_weight_w4p(
    weight: torch.Tensor, group_size: int, importance: torch.Tensor | None = None
) -> W4P:
    """Progressive int4 weights: a row scale, then integer scale and offset for each group.

    Each group tries 6 ranges x 3 offsets and keeps the least squared error; the first wins a tie.
    A row times a power of two gives the same codes and that multiple of the scale, exactly.

    Args:
        weight: [N, K] float, finite.
        group_size: neighbouring inputs that share a code range; see `resolve_group_size`.
        importance: [K] float, positive: what a squared error in a column weighs; then 11 ranges x 7 offsets are tried.
            None: all alike.

    Raises:
        ValueError: not a finite float matrix, or a group size that does not fit K.
    """
    weight = finite_matrix(weight, "quantize_weight_w4p")
    num_rows, in_features = weight.shape
    if group_size <= 0 or group_size % GROUP_MULTIPLE or in_features % group_size:
        raise ValueError(
            f"quantize_weight_w4p: group_size must be a multiple of {GROUP_MULTIPLE} that divides "
            f"K, got K={in_features}, group_size={group_size}; take resolve_group_size(K, wanted)"
        )
    scale = numerics.symmetric_scale(weight.abs().amax(dim=1))
    inv_scale = numerics.inverse_scale(scale)[:, None]
    weighed = None if importance is None else importance.float().reshape(-1, group_size)
    rows_per_chunk = max(1, CHUNK_ELEMENTS // in_features)
    chunks = [
        _search_groups((rows * inv).unflatten(1, (-1, group_size)), weighed)
        for rows, inv in zip(
            weight.split(rows_per_chunk), inv_scale.split(rows_per_chunk), strict=True
        )
    ]
    codes, group_scale, group_offset = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return W4P(
        packing.pack_int4(codes.view(num_rows, in_features)), group_scale, group_offset, scale
    )


def finite_matrix(weight: torch.Tensor, op: str) -> torch.Tensor:
    """A weight [N, K] in fp32; ValueError if it is no float matrix or not finite."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            f"{op}: expected a float weight [N, K], got {list(weight.shape)} {weight.dtype}; "
            "flatten convolutions to [N, C * kh * kw]"
        )
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"{op}: expected finite weights, got NaN, infinity or values beyond fp32; "
            "check the source checkpoint"
        )
    return weight


def _search_groups(
    units: torch.Tensor, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best (codes uint8, group_scale uint8, group_offset int8) for weights in int8 units [R, J, G], columns [J, G]."""
    plain = importance is None
    shrinks, steps = (RANGE_SHRINKS, OFFSET_STEPS) if plain else (FINE_SHRINKS, FINE_STEPS)
    high, low = units.amax(dim=2), units.amin(dim=2)
    best_error = torch.full_like(high, torch.inf)
    best_scale, best_offset = torch.ones_like(high), torch.zeros_like(high)
    for shrink in shrinks:
        group_scale = ((high - low) * (shrink / 15.0)).round_().clamp_(1, MAX_GROUP_SCALE)
        for step in steps:
            offset = ((high + low) * 0.5 - 7.5 * group_scale + step).round_().clamp_(-128, 127)
            values = _codes(units, group_scale, offset)
            values.mul_(group_scale[:, :, None]).add_(offset[:, :, None]).sub_(units)
            values.square_()
            error = (values if importance is None else values.mul_(importance)).sum(dim=2)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, group_scale, best_scale)
            best_offset = torch.where(better, offset, best_offset)
    codes = _codes(units, best_scale, best_offset)
    return codes.to(torch.uint8), best_scale.to(torch.uint8), best_offset.to(torch.int8)


def _codes(units: torch.Tensor, group_scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Nearest codes 0..15 whose value `code * group_scale + offset` stays in [-127, 127]."""
    lowest = ((-numerics.INT8_MAX - offset) / group_scale).ceil_().clamp_(min=0)
    highest = ((numerics.INT8_MAX - offset) / group_scale).floor_().clamp_(max=numerics.INT4_LEVELS)
    codes = (units - offset[:, :, None]).mul_((1.0 / group_scale)[:, :, None])
    codes.add_(ROUND_TO_INTEGER).sub_(ROUND_TO_INTEGER)  # torch.round would start threads
    return torch.clamp(codes, lowest[:, :, None], highest[:, :, None], out=codes)

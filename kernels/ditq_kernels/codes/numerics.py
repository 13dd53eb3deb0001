"""Integer ranges, scales, rounding: the only definitions of quantize and dequantize.

Every rule is exact to the bit and holds for the converters and for the kernels alike:

- arithmetic is fp32, each step correctly rounded; 16-bit inputs are widened first (exact);
- `q = clamp(round(x * inv_scale))` with `inv_scale = 1 / scale`: multiply, never divide by the scale;
- ties round to even; the integer zero point is added after rounding;
- zero is always inside an asymmetric range, so it has an exact code;
- inputs are finite. A range wider than fp32 (`high - low` overflows) is not supported.

Divisors are tensors on purpose: torch on CUDA turns division by a Python number into a
multiplication by its reciprocal, which changes one scale in twenty by one unit in the last place.
"""

import torch

INT8_MAX = 127  # symmetric codes are narrow: -128 is never emitted
INT8_LEVELS = 255  # an asymmetric range has 255 steps, 256 codes
INT8_OFFSET = 128  # asymmetric codes v in [0, 255] are stored as int8 v - 128
INT4_MAX = 7  # symmetric int4 codes are narrow too: -8 is never emitted
INT4_LEVELS = 15  # 15 steps, 16 codes
INT4_ZERO = 8  # the code of 0.0 in symmetric int4: codes are unsigned
MIN_SCALE = 2.0**-40  # all-zero groups get this scale and need no special case


def symmetric_scale(absmax: torch.Tensor, largest: int = INT8_MAX) -> torch.Tensor:
    """Real value of one step of a symmetric code: `max(absmax / largest, MIN_SCALE)`.

    Args:
        absmax: any shape, float. Largest magnitude of each group, in units of x.
        largest: the code of absmax: INT8_MAX or INT4_MAX.

    Returns:
        fp32, same shape, in units of x.
    """
    absmax = absmax.float()
    return (absmax / torch.full_like(absmax, largest)).clamp_min(MIN_SCALE)


def asymmetric_scale(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of an asymmetric int8 code for the range [low, high], widened to hold 0.

    Args:
        low: any shape, float. Smallest value of each group, in units of x.
        high: same shape. Largest value of each group.

    Returns:
        scale: fp32, same shape, in units of x: `max((high - low) / 255, MIN_SCALE)`.
        zero_point: int32, same shape, in [-128, 127]: the stored code of 0.0.
    """
    scale, code = _range_scale(low, high, INT8_LEVELS)
    return scale, code.to(torch.int32) - INT8_OFFSET


def asymmetric_scale_int4(
    low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of an int4 code for the range [low, high], widened to hold 0.

    Args:
        low: any shape, float. Smallest value of each group, in units of x.
        high: same shape. Largest value of each group.

    Returns:
        scale: fp32, same shape, in units of x: `max((high - low) / 15, MIN_SCALE)`.
        zero_point: uint8, same shape, in 0..15: the code of 0.0.
    """
    scale, code = _range_scale(low, high, INT4_LEVELS)
    return scale, code.to(torch.uint8)


def _range_scale(
    low: torch.Tensor, high: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, and the code 0..levels of 0.0 as fp32."""
    low = low.float().clamp_max(0.0)
    high = high.float().clamp_min(0.0)
    width = high - low
    scale = (width / torch.full_like(width, levels)).clamp_min(MIN_SCALE)
    return scale, torch.round(-low * inverse_scale(scale)).clamp(0, levels)


def inverse_scale(scale: torch.Tensor) -> torch.Tensor:
    """`1 / scale` in fp32, correctly rounded."""
    return torch.ones_like(scale) / scale


def quantize_symmetric(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric int8 codes: `clamp(round(x * (1 / scale)), -127, 127)`.

    Args:
        x: float, in units of x.
        scale: fp32, broadcasts against x.

    Returns:
        int8 codes in [-127, 127], the shape of x.
    """
    rounded = (x.float() * inverse_scale(scale)).round_()
    return rounded.clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


def quantize_asymmetric(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    """Asymmetric int8 codes: `zero_point + clamp(round(x * (1 / scale)))`, inside [-128, 127].

    Args:
        x: float, in units of x.
        scale: fp32, broadcasts against x.
        zero_point: int32 in [-128, 127], broadcasts against x.

    Returns:
        int8 codes in [-128, 127], the shape of x.
    """
    rounded = (x.float() * inverse_scale(scale)).round_()
    # |rounded| may exceed int32, so it stays a float: exact below 2**24, and beyond that it is clamped all the same
    codes = (rounded + zero_point).clamp_(-INT8_OFFSET, INT8_MAX)
    return codes.to(torch.int8)


def quantize_int4(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Int4 codes: `zero_point + clamp(round(x * (1 / scale)))`, inside 0..15.

    Args:
        x: float, in units of x.
        scale: fp32, broadcasts against x.
        zero_point: uint8 in 0..15, broadcasts against x. INT4_ZERO with a symmetric scale.

    Returns:
        uint8 codes in 0..15, the shape of x.
    """
    rounded = torch.round(x.float() * inverse_scale(scale))
    zero = zero_point.float()
    return (torch.clamp(rounded, -zero, INT4_LEVELS - zero) + zero).to(torch.uint8)


def dequantize(
    q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Real values of codes: `scale * (q - zero_point)`, fp32.

    Args:
        q: integer codes.
        scale: fp32, broadcasts against q.
        zero_point: int32 in the stored form, broadcasts against q; absent means symmetric.
    """
    steps = q.to(torch.int32) if zero_point is None else q.to(torch.int32) - zero_point
    return steps.float() * scale

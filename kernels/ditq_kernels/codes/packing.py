"""Two int4 codes in a byte: the file's bit layout, packed and unpacked side by side.

A code is offset binary, 0..15, unsigned. Bytes run along the inputs, low nibble first:

    byte c of row n:   7 6 5 4 | 3 2 1 0
                      code 2c+1| code 2c        packed[n, c] = code[n, 2c] | code[n, 2c+1] << 4

`packed ^ 0x88` is the same byte in two's complement nibbles.
"""

import torch

from ditq_kernels.codes.numerics import INT4_LEVELS

GROUP_MULTIPLE = 32  # one int8 tensor-core instruction consumes 32 inputs: groups never split it
WIDE_UNIT, NARROW_UNIT = (
    128,
    64,
)  # inputs of progressive int4 whose codes share bytes in kernel order


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack int4 codes two to a byte, even input in the low nibble.

    Args:
        codes: [N, K] uint8 in 0..15, K even.

    Returns:
        [N, K / 2] uint8.

    Raises:
        ValueError: wrong dtype or shape, odd K, or a code above 15.
    """
    if codes.dim() != 2 or codes.dtype != torch.uint8 or codes.shape[1] % 2:
        raise ValueError(
            "pack_int4: expected codes [N, K] uint8 with K even, got "
            f"{list(codes.shape)} {codes.dtype}; pad K to an even number"
        )
    if codes.numel() and int(codes.max()) > INT4_LEVELS:
        raise ValueError(
            f"pack_int4: expected codes in 0..15, got {int(codes.max())}; clamp before packing"
        )
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Codes of packed bytes; the inverse of `pack_int4`.

    Args:
        packed: [N, K / 2] uint8.

    Returns:
        [N, K] uint8 in 0..15.

    Raises:
        ValueError: wrong dtype or shape.
    """
    if packed.dim() != 2 or packed.dtype != torch.uint8:
        raise ValueError(
            "unpack_int4: expected packed bytes [N, K / 2] uint8, got "
            f"{list(packed.shape)} {packed.dtype}; pass the tensor pack_int4 returned"
        )
    # a byte becomes the two bytes of an int16, low nibble first: one pass over contiguous memory for both
    pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
    return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)


def expand_w4p(
    packed: torch.Tensor, group_scale: torch.Tensor, group_offset: torch.Tensor
) -> torch.Tensor:
    """Int8 weights behind progressive int4 codes: `code * group_scale + group_offset`.

    Args:
        packed: [N, K / 2] uint8, two codes a byte, in either order (see `arranged`).
        group_scale: [N, J] uint8 in 1..17. J groups of K / J neighbouring inputs.
        group_offset: [N, J] int8.

    Returns:
        [N, K] int8. A packer of ours keeps every value in [-127, 127].

    Raises:
        ValueError: packed is no byte matrix, or J does not divide K.
    """
    in_features, num_groups = 2 * packed.shape[-1], group_scale.shape[1]
    if num_groups == 0 or in_features % num_groups:
        raise ValueError(
            f"expand_w4p: the number of groups must divide K, got K={in_features}, "
            f"J={num_groups}; pass the group_scale made with these codes"
        )
    codes = _codes(packed, group_scale, kernel_unit(in_features, in_features // num_groups))
    # bytes wrap around at 256: where the sum fits into int8, it is exact
    values = codes.view(len(codes), num_groups, -1).mul_(group_scale[:, :, None])
    values.add_(group_offset.view(torch.uint8)[:, :, None])
    return values.view(torch.int8).view(codes.shape)


def expand_w4g(packed: torch.Tensor, weight_zero: torch.Tensor) -> torch.Tensor:
    """Integer weights behind int4 codes with a zero point per group: `code - weight_zero`.

    Args:
        packed: [N, K / 2] uint8, two codes a byte, in either order (see `arranged`).
        weight_zero: [N, J] uint8 in 0..15. J groups of K / J neighbouring inputs.

    Returns:
        [N, K] int8 in [-15, 15].

    Raises:
        ValueError: packed is no byte matrix, or J does not divide K.
    """
    in_features, num_groups = 2 * packed.shape[-1], weight_zero.shape[1]
    if num_groups == 0 or in_features % num_groups:
        raise ValueError(
            f"expand_w4g: the number of groups must divide K, got K={in_features}, "
            f"J={num_groups}; pass the weight_zero made with these codes"
        )
    codes = _codes(packed, weight_zero, kernel_span(in_features // num_groups))
    grouped = codes.to(torch.int8).unflatten(1, (num_groups, -1))
    return (grouped - weight_zero.to(torch.int8)[:, :, None]).flatten(1)


def is_arranged(per_group: torch.Tensor) -> bool:
    """Whether int4 weights are in kernel order, by what belongs to their groups [N, J], or by rows of that."""
    return per_group.shape[1] > 1 and per_group.stride(1) != 1


def kernel_unit(in_features: int, group_size: int) -> int:
    """Inputs per unit of progressive int4: 128, or 64 where 128 would straddle groups or pad."""
    wide = in_features % WIDE_UNIT == 0 and group_size % (WIDE_UNIT // 2) == 0
    return WIDE_UNIT if wide else NARROW_UNIT


def kernel_span(group_size: int) -> int:
    """Inputs per unit of int4 with real groups: a group, one nibble each half; or two groups, one nibble each.

    Half a span is a multiple of 32, so a group of an odd number of 32 inputs goes with its neighbour.
    A group that is no multiple of 32 (all of an odd K) is padded.
    """
    if group_size % GROUP_MULTIPLE:
        return group_size + -group_size % (2 * GROUP_MULTIPLE)
    return group_size if group_size % (2 * GROUP_MULTIPLE) == 0 else 2 * group_size


def split_for_kernel(packed: torch.Tensor, unit: int) -> torch.Tensor:
    """Reorder packed codes for tensor cores; never stored in a file.

    Within each unit of inputs, byte j holds input j low and input j + unit / 2 high, so that both
    nibbles of a tile are ordinary matrices whose inputs are contiguous:

        file, unit 64:    byte 0 = inputs 1 | 0    byte 1 = inputs 3 | 2     ...  31 = 63 | 62
        kernel, unit 64:  byte 0 = inputs 32 | 0   byte 1 = inputs 33 | 1    ...  31 = 63 | 31

    Args:
        packed: [N, K / 2] uint8 in file order.
        unit: inputs per unit, even. K is padded to a multiple of it with zero codes.

    Returns:
        [N, ceil(K / unit) * unit / 2] uint8.
    """
    codes = unpack_int4(packed)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % unit))
    halves = codes.view(codes.shape[0], -1, 2, unit // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def unsplit_from_kernel(split: torch.Tensor, unit: int, in_features: int) -> torch.Tensor:
    """File order again; the inverse of `split_for_kernel`.

    Args:
        split: [N, ceil(K / unit) * unit / 2] uint8 in kernel order.
        unit: inputs per unit, as it was split.
        in_features: K, even. Padding beyond it is dropped.

    Returns:
        [N, K / 2] uint8.
    """
    halves = split.view(split.shape[0], -1, unit // 2)
    codes = torch.cat((halves & 15, halves >> 4), dim=2).flatten(1)[:, :in_features]
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _codes(packed: torch.Tensor, per_group: torch.Tensor, unit: int) -> torch.Tensor:
    """uint8 [N, K], contiguous and new, of bytes in either order."""
    if not is_arranged(per_group):
        return unpack_int4(packed)
    halves = packed.view(packed.shape[0], -1, 1, unit // 2)
    return torch.cat((halves & 15, halves >> 4), dim=2).flatten(1)

"""Bits of packed int4 codes: golden bytes, round trips, the kernel order."""

import pytest
import torch

import ditq_kernels as k
from ditq_kernels.codes import packing


def test_golden_bytes():
    codes = torch.tensor([[1, 2, 15, 0], [0, 8, 7, 9]], dtype=torch.uint8)
    assert k.pack_int4(codes).tolist() == [[0x21, 0x0F], [0x80, 0x97]]


@pytest.mark.parity("P6")
def test_every_byte_survives_a_round_trip():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(k.pack_int4(k.unpack_int4(packed)), packed)
    low, high = k.unpack_int4(packed)[:, 0::2], k.unpack_int4(packed)[:, 1::2]
    assert torch.equal(low, packed % 16)
    assert torch.equal(high, packed // 16)


@pytest.mark.parity("P6")
def test_flipping_top_bits_gives_twos_complement():
    packed = torch.arange(256, dtype=torch.uint8).view(1, 256)
    signed = (packed ^ 0x88).view(torch.int8)
    codes = k.unpack_int4(packed).to(torch.int8) - 8
    assert torch.equal((signed << 4) >> 4, codes[:, 0::2])
    assert torch.equal(signed >> 4, codes[:, 1::2])
    assert torch.equal(
        signed & -16, codes[:, 1::2] * 16
    )  # reading the high nibble is 16 x the code


@pytest.mark.parity("P6")
@pytest.mark.parametrize(
    "codes",
    [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), torch.zeros(2, 4)],
)
def test_pack_refuses_what_has_no_bytes(codes):
    with pytest.raises(ValueError, match=r"pack_int4: expected codes \[N, K\] uint8 with K even"):
        k.pack_int4(codes)


def test_pack_refuses_codes_above_15():
    with pytest.raises(ValueError, match=r"codes in 0\.\.15, got 16"):
        k.pack_int4(torch.tensor([[3, 16]], dtype=torch.uint8))


def test_unpack_refuses_other_dtypes():
    with pytest.raises(ValueError, match="unpack_int4"):
        k.unpack_int4(torch.zeros(2, 2, dtype=torch.int8))


def test_expand_is_code_times_scale_plus_offset():
    packed = k.pack_int4(torch.arange(64, dtype=torch.uint8).remainder(16).view(1, 64))
    scale = torch.tensor([[2, 17]], dtype=torch.uint8)
    offset = torch.tensor([[-5, -128]], dtype=torch.int8)
    expected = [c * 2 - 5 for c in range(16)] * 2 + [c * 17 - 128 for c in range(16)] * 2
    assert k.expand_w4p(packed, scale, offset).tolist() == [expected]


def test_expand_refuses_groups_that_do_not_divide():
    packed = torch.zeros(1, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"expand_w4p: .* got K=64, J=3"):
        k.expand_w4p(
            packed, torch.ones(1, 3, dtype=torch.uint8), torch.zeros(1, 3, dtype=torch.int8)
        )


@pytest.mark.parametrize("unit", [64, 128])
@pytest.mark.parametrize("in_features", [64, 96, 128, 160, 384, 1152])
def test_kernel_order(unit, in_features, generator):
    codes = torch.randint(0, 16, (3, in_features), generator=generator, dtype=torch.uint8)
    split = packing.split_for_kernel(k.pack_int4(codes), unit)
    padded = -(-in_features // unit) * unit
    assert split.shape == (3, padded // 2)
    for start in range(0, padded, unit):  # by hand, byte by byte
        for j in range(unit // 2):
            low, high = start + j, start + j + unit // 2
            byte = split[:, start // 2 + j]
            zero = torch.zeros(3, dtype=torch.uint8)
            assert torch.equal(byte & 15, codes[:, low] if low < in_features else zero)
            assert torch.equal(byte >> 4, codes[:, high] if high < in_features else zero)


@pytest.mark.parametrize(("unit", "in_features"), [(64, 96), (64, 64), (128, 1152)])
def test_kernel_order_round_trip(unit, in_features, generator):
    packed = torch.randint(0, 256, (5, in_features // 2), generator=generator, dtype=torch.uint8)
    split = packing.split_for_kernel(packed, unit)
    assert torch.equal(packing.unsplit_from_kernel(split, unit, in_features), packed)

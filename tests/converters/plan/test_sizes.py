"""Bytes of plans: a 4-bit plan that is larger than one in 8 bits says so."""

import pytest

from ditq_converters import Recipe, convert, make_plan
from ditq_converters.plan.sizes import larger_than_eight_bits


@pytest.fixture(scope="module")
def model(make_dit):
    return make_dit(2)


def by_hand(rank):
    """Of a tiny DiT: 2 blocks of modulation [384, 64], qkv and output [64, 64] and MLP [256, 64], [64, 256]; the last
    modulation stays in 8 bits. Per output 4 bytes of scale and 4 of bias; a group of 64 inputs takes 2 bytes."""
    readers = [(64, 64)] * 4 + [(256, 64), (64, 256)]
    four = eight = 0
    for n, k in [(384, 64), *readers]:
        four += n * k // 2 + n * 8 + 2 * n * (k // 64)
        eight += n * k + n * 8
    four += sum(2 * rank * (n + k) for n, k in readers)
    last = 128 * 64 + 128 * 8
    return 2 * four + last, 2 * eight + last


@pytest.mark.parametrize("rank", [0, 8, 32])
def test_a_branch_that_eats_what_4_bits_save_is_told(model, rank, capsys):
    four, eight = by_hand(rank)
    told = larger_than_eight_bits(make_plan(model, weights="w4p", lora_rank=rank), model)
    convert(model, Recipe(weights="w4p", method="linear", lora_rank=rank))
    printed = capsys.readouterr().err
    if four <= eight:
        assert rank < 32
        assert told is None
        assert "take" not in printed
    else:
        assert f"in 4 bits take {four:,} bytes with their branches of rank {rank}" in told
        assert f"more than the {eight:,} that 8 bits without take" in told
        assert told in printed


def test_8_bits_are_never_too_large(model):
    assert larger_than_eight_bits(make_plan(model, weights="w8", lora_rank=64), model) is None

"""Who shares a scale: against loops over the groups, and what commutes with smoothing (DiTAS, arXiv:2409.07756)."""

import pytest
import torch

from ditq_bench.simulated.granularity import (
    GRANULARITIES,
    FoldedWeight,
    fake_quantize_weight,
)


def weight_of(rows=64, inputs=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    return weight * torch.logspace(-1, 1, inputs, dtype=torch.float64)


def smooth_of(inputs=96, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.randn(inputs, generator=generator, dtype=torch.float64))


def quantized_alone(values, bits=4):
    """One group, in plain arithmetic."""
    low, high = min(values.min().item(), 0), max(values.max().item(), 0)
    step = (high - low) / (2**bits - 1)
    zero = round(-low / step)
    return ((values / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step


def groups_of(granularity, rows, inputs, size):
    """Index sets (rows, columns) of the groups, written out."""
    every = list(range(rows))
    if granularity == "per_out_channel":
        return [([n], list(range(inputs))) for n in range(rows)]
    if granularity == "per_in_channel":
        return [(every, [k]) for k in range(inputs)]
    if granularity == "per_in_channel_code":
        stride = rows // 32
        return [([n for n in every if n % stride == r], [k])
                for r in range(stride) for k in range(inputs)]  # fmt: skip
    blocks = [list(range(j, j + size)) for j in range(0, inputs, size)]
    if granularity == "per_in_group":
        return [(every, block) for block in blocks]
    return [([n], block) for n in every for block in blocks]


@pytest.mark.parity("P12", "P20")
@pytest.mark.parametrize(
    "granularity", [name for name in GRANULARITIES if name != "per_in_channel_folded"]
)
def test_every_group_is_quantized_alone(granularity):
    weight = weight_of()
    found = fake_quantize_weight(weight, granularity, 4, size=32)
    groups = groups_of(granularity, 64, 96, 32)
    if granularity == "per_in_channel_code":
        assert {len(rows) for rows, _ in groups} == {32}
    for rows, columns in groups:
        part = weight[rows][:, columns]
        torch.testing.assert_close(
            found[rows][:, columns], quantized_alone(part), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parity("P12")
def test_the_code_s_groups_need_a_multiple_of_32_rows():
    with pytest.raises(ValueError, match="multiple of 32, got N=48"):
        fake_quantize_weight(weight_of(48), "per_in_channel_code", 4)


@pytest.mark.parity("P11")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rule", ["asymmetric", "symmetric", "ditas_code"])
@pytest.mark.parametrize("granularity", ["per_in_channel", "per_in_channel_code"])
def test_scales_per_input_channel_commute_with_smoothing(granularity, rule, bits):
    weight, smooth = weight_of(), smooth_of()
    after = fake_quantize_weight(weight, granularity, bits, rule) * smooth
    before = fake_quantize_weight(weight * smooth, granularity, bits, rule)
    # a few fp64 roundings; no value of this weight lies that close to a tie
    torch.testing.assert_close(before, after, rtol=1e-12, atol=0)


@pytest.mark.parity("P11")
@pytest.mark.parametrize("granularity", ["per_out_channel", "per_in_group", "group_k"])
def test_other_granularities_do_not(granularity):
    weight, smooth = weight_of(), smooth_of()
    after = fake_quantize_weight(weight, granularity, 4, size=32) * smooth
    before = fake_quantize_weight(weight * smooth, granularity, 4, size=32)
    assert float((before - after).norm() / after.norm()) > 0.05


@pytest.mark.parity("P13")
def test_the_zero_points_of_a_folded_weight_are_one_more_row():
    generator = torch.Generator().manual_seed(5)
    folded = FoldedWeight.of(weight_of() + 0.3, 4)
    assert int(folded.zero.min()) < int(folded.zero.max())
    q = torch.randint(-255, 256, (7, 96), generator=generator)
    q[0], q[1] = 255, -255
    direct = q @ (folded.codes - folded.zero).T  # int64
    assert torch.equal(folded.product(q), direct.double())
    assert int(direct.abs().max()) < 2**31  # an int32 kernel could sum it
    assert folded.codes.min() >= 0
    assert folded.codes.max() <= 15


@pytest.mark.parity("P13")
def test_smoothing_cancels_in_a_folded_weight():
    weight, smooth = weight_of(), smooth_of()
    plain, smoothed = FoldedWeight.of(weight, 4), FoldedWeight.of(weight * smooth, 4)
    assert torch.equal(plain.codes, smoothed.codes)
    assert torch.equal(plain.zero, smoothed.zero)
    torch.testing.assert_close(plain.scale * smooth, smoothed.scale, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        plain.dequantize(), fake_quantize_weight(weight, "per_in_channel", 4), rtol=1e-14, atol=0
    )


def test_unknown_granularities_are_refused():
    with pytest.raises(ValueError, match=r"per_out_channel, .*got 'per_row'"):
        fake_quantize_weight(weight_of(), "per_row", 4)

"""Int4 weights in kernel order: the same values to every reader, the same bytes back, told by strides."""

import copy
import pickle

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import (
    gemm_qkv_quantize,
    gemm_residual,
    gemm_w4a8_per_group,
    linear_w4,
    w4_expand,
)
from ditq_kernels.codes import packing
from ditq_kernels.codes.arranged import arrange, can_arrange, in_file_order
from ditq_kernels.reference import fused, linear

KINDS = {"w4p": k.quantize_weight_w4p, "w4g": k.quantize_weight_w4g}
# K, group size: wide and narrow units, a group in and across units, groups that go in pairs
SIZES = [(128, 64), (256, 128), (1152, 96), (192, 64), (128, 32), (384, 192)]


def parts_of(weight):
    """As `arrange` takes them."""
    if isinstance(weight, k.W4P):
        return "w4p", weight.packed, weight.group_scale, weight.group_offset
    return "w4g", weight.packed, weight.scale, weight.weight_zero, weight.weight_sum()


@pytest.fixture(params=KINDS)
def quantize(request, generator):
    """A weight [N, K] of each kind."""
    return lambda n, k_, group: KINDS[request.param](torch.randn(n, k_, generator=generator), group)


@pytest.mark.parametrize(("in_features", "group_size"), SIZES)
def test_there_and_back_is_the_same_bytes(quantize, in_features, group_size):
    kind, *parts = parts_of(quantize(6, in_features, group_size))
    moved = arrange(kind, *parts)
    assert packing.is_arranged(moved[1])
    assert not torch.equal(moved[0], parts[0])
    for before, after in zip(parts, moved, strict=True):
        assert (after.shape, after.dtype, after.nbytes) == (
            before.shape,
            before.dtype,
            before.nbytes,
        )
    for before, after in zip(parts[1:], moved[1:], strict=True):
        assert torch.equal(before, after)  # values stay; their places do not
    for before, after in zip(parts, in_file_order(kind, *moved), strict=True):
        assert torch.equal(before, after)
        assert before.stride() == after.stride()


def test_the_order_of_a_unit_by_hand():
    """Unit 64: byte 0 holds inputs 0 and 32, byte 31 inputs 31 and 63."""
    codes = (torch.arange(128) % 16).to(torch.uint8).repeat(2, 1)
    codes[:, 32:64] = 15 - codes[:, 32:64]
    scale, offset = torch.ones(2, 4, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.int8)
    moved, *_ = arrange("w4p", k.pack_int4(codes), scale, offset)
    assert moved[0, :2].tolist() == [0 | 15 << 4, 1 | 14 << 4]
    assert moved[1, 31].item() == 15 | 0 << 4


@pytest.mark.parametrize(("in_features", "group_size"), SIZES)
def test_readers_see_the_same_weights(quantize, in_features, group_size):
    weight = quantize(6, in_features, group_size)
    moved = weight.arranged()
    assert moved is not weight
    assert moved.arranged() is moved
    assert torch.equal(moved.expand(), weight.expand())
    assert torch.equal(moved.dequantize(), weight.dequantize())
    assert torch.equal(moved.weight_sum(), weight.weight_sum())
    if isinstance(weight, k.W4P):
        groups = moved.group_scale, moved.group_offset
        rows = [
            packing.expand_w4p(moved.packed[i : i + 1], *(g[i : i + 1] for g in groups))
            for i in range(6)
        ]
        assert torch.equal(torch.cat(rows), weight.expand())  # rows of it, as the CPU takes them
        assert torch.equal(w4_expand.launch(moved.packed, *groups), weight.expand())


@pytest.mark.parametrize(
    ("rows", "in_features", "group_size"),
    [(1, 128, 64), (6, 64, 64), (6, 96, 32)],  # one row, one group, half a unit to pad
)
def test_what_strides_would_not_tell_or_kernels_would_pad_stays(
    quantize, rows, in_features, group_size
):
    weight = quantize(rows, in_features, group_size)
    kind, *parts = parts_of(weight)
    if group_size == 32 and kind == "w4g":
        assert in_features % packing.kernel_span(group_size)
    assert not can_arrange(kind, *parts[:2])
    assert weight.arranged() is weight


@pytest.mark.parametrize(
    "travel",
    [
        copy.deepcopy,
        lambda t: pickle.loads(pickle.dumps(t)),
        lambda t: t.to("meta"),
        lambda t: torch.empty_like(t),
        lambda t: t.clone(),
        lambda t: torch.nn.Parameter(t, requires_grad=False).data,
        lambda t: t[1:2],
        lambda t: t.to(torch.float64),
    ],
)
def test_the_order_travels_with_tensors(travel):
    scale = torch.ones(6, 4)
    assert packing.is_arranged(travel(scale.t().contiguous().t()))
    assert not packing.is_arranged(travel(scale))


def layer(kind, generator, rows=24):
    weight = KINDS[kind](torch.randn(rows, 128, generator=generator), 64)
    q = torch.randint(-127, 128, (8, 128), generator=generator, dtype=torch.int8)
    zero = torch.tensor([3], dtype=torch.int32)
    return weight, q, torch.rand(1, generator=generator), {"zero_point": zero}


@pytest.mark.parametrize("kind", KINDS)
def test_ops_take_either_order(kind, generator):
    weight, q, scale, zero = layer(kind, generator)
    options = {"residual": torch.randn(8, 24, generator=generator), **zero}
    step = torch.rand(1, generator=generator)
    out = {"out_scale": step, "out_zero_point": torch.zeros(1, dtype=torch.int32), **zero}
    for op, others in ((k.gemm_residual, options), (k.gemm_gelu_quantize, out)):
        made = [
            op(q, one, scale, weight_sum=one.weight_sum(), **others)
            for one in (weight, weight.arranged())
        ]
        assert torch.equal(*made)
    three = tuple(KINDS[kind](torch.randn(64, 128, generator=generator), 64) for _ in "qkv")
    heads = {"batch": 2, "heads": 1, "head_scales": (step, step, step)}
    made = [
        k.gemm_qkv_quantize(q, ones, scale, **heads)
        for ones in (three, tuple(w.arranged() for w in three))
    ]
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_read_kernel_order_as_the_reference_reads_the_files(kind, generator):
    weight, q, scale, zero = layer(kind, generator)
    moved, residual = weight.arranged(), torch.randn(8, 24, generator=generator)
    named = lambda w: parts_of(w)[1:4]  # noqa: E731
    if kind == "w4p":
        parts = [(packed, gs, go) for packed, gs, go in map(named, (weight, moved))]
    else:
        parts = [(packed, None, wz) for packed, _, wz in map(named, (weight, moved))]
    rest = [
        (scale, w.scale, None, zero["zero_point"], w.weight_sum(), None, None, None)
        for w in (weight, moved)
    ]
    expected = fused.gemm_residual(q, *parts[0], residual, None, *rest[0])
    assert torch.equal(gemm_residual.launch(q, *parts[1], residual, None, *rest[1]), expected)
    if kind == "w4g":
        arguments = (None, zero["zero_point"], weight.weight_sum(), torch.float32)
        expected = linear.gemm_w4a8_per_group(
            q, weight.packed, scale, weight.scale, weight.weight_zero, *arguments
        )
        arguments = (None, zero["zero_point"], moved.weight_sum(), torch.float32)
        y = gemm_w4a8_per_group.launch(
            q, moved.packed, scale, moved.scale, moved.weight_zero, *arguments
        )
        assert torch.equal(y, expected)
        return
    x = torch.randn(2, 128, generator=generator)
    y = [linear_w4.launch(x, *named(w), w.scale, None, torch.float32) for w in (weight, moved)]
    assert torch.equal(*y)


@pytest.mark.parametrize("kind", KINDS)
def test_three_layers_in_kernel_order(kind, generator):
    _, q, scale, _ = layer(kind, generator)
    three = [KINDS[kind](torch.randn(64, 128, generator=generator), 64) for _ in "qkv"]
    step = [torch.rand(1, generator=generator) for _ in "qkv"]

    def run(weights):
        packed, first, second = (
            list(parts) for parts in zip(*(parts_of(w)[1:4] for w in weights), strict=True)
        )
        groups = (first, second) if kind == "w4p" else ([], second)
        scales = [w.scale for w in weights]
        return gemm_qkv_quantize.launch(
            q, packed, *groups, step, None, 2, 1, scale, scales, [], None, [], None
        )

    for one, other in zip(run(three), run([w.arranged() for w in three]), strict=True):
        assert torch.equal(one, other)


def test_parts_of_two_orders_are_refused(generator):
    weight, q, scale, _ = layer("w4p", generator)
    moved = weight.arranged()
    for groups in (
        (weight.group_scale, moved.group_offset),
        (moved.group_scale, weight.group_offset),
    ):
        with pytest.raises(ValueError, match=r"group_offset.*(contiguous|kernel order)"):
            k.gemm_w4a8(q, weight.packed, scale, *groups, weight.scale)

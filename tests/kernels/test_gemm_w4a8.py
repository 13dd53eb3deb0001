"""W4A8: equal, bit for bit, to W8A8 on the expanded weights; the kernel's packing and its cache."""

import gc
import weakref

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import gemm_w4a8 as kernel
from ditq_kernels._triton.parts import prepared_w4
from ditq_kernels.codes import packing
from ditq_kernels.codes.arranged import arrange
from ditq_kernels.launch.tuning import TileConfig
from ditq_kernels.reference import linear as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weights(out_features, in_features, group_size, generator):
    """Random codes whose expansion reaches both ends of int8, not only what our packer emits."""
    num_groups = in_features // group_size
    shape = (out_features, num_groups)
    group_scale = torch.randint(1, 18, shape, generator=generator).clamp_(max=17)
    room = 255 - 15 * group_scale  # offset + 15 * scale <= 127
    offset = (torch.rand(shape, generator=generator) * (room + 1)).long() - 128
    codes = torch.randint(0, 16, (out_features, in_features), generator=generator).to(torch.uint8)
    scale = torch.rand(out_features, generator=generator) / 100
    return k.W4P(k.pack_int4(codes), group_scale.to(torch.uint8), offset.to(torch.int8), scale)


def problem(num_tokens, out_features, in_features, group_size, generator):
    """Arguments of reference.gemm_w4a8 and launch, without out_dtype, and the expanded weights."""
    w = weights(out_features, in_features, group_size, generator)
    q = torch.randint(-128, 128, (num_tokens, in_features), generator=generator, dtype=torch.int8)
    scale = torch.rand(num_tokens, generator=generator) / 100
    zero_point = torch.randint(-128, 128, (num_tokens,), generator=generator, dtype=torch.int32)
    bias = torch.randn(out_features, generator=generator)
    arguments = [q, w.packed, scale, w.group_scale, w.group_offset, w.scale, bias, zero_point]
    return [*arguments, w.weight_sum()], w.expand()


def to(device, arguments):
    return [value.to(device) for value in arguments]


def on_expanded(arguments, expanded, out_dtype):
    q, _, scale, _, _, *epilogue = arguments
    return reference.gemm_w8a8(q, expanded, scale, *epilogue, out_dtype)


@pytest.mark.parametrize("group_size", [32, 64, 192])
def test_op_equals_w8a8_on_expanded_weights(group_size, generator):
    arguments, expanded = problem(9, 20, 192, group_size, generator)
    *positional, zero_point, weight_sum = arguments
    y = k.gemm_w4a8(*positional, zero_point=zero_point, weight_sum=weight_sum)
    assert torch.equal(y, on_expanded(arguments, expanded, torch.float32))


@pytest.mark.parity("P7")
# wide and narrow packing units, groups inside, equal to and across units, K padded to a unit
@pytest.mark.parametrize(
    ("num_tokens", "out_features", "in_features", "group_size"),
    [
        (1, 32, 128, 128), (33, 40, 128, 64), (40, 33, 256, 256), (5, 7, 384, 192), (3, 35, 128, 32),
        (37, 32, 96, 32), (37, 32, 96, 96), (9, 70, 64, 64), (2, 3, 32, 32), (6, 5, 192, 64),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("poisoned")
def test_kernel_equals_w8a8(num_tokens, out_features, in_features, group_size, device, generator):
    arguments, expanded = problem(num_tokens, out_features, in_features, group_size, generator)
    for out_dtype in DTYPES:
        y = kernel.launch(*to(device, arguments), out_dtype)
        assert torch.equal(y.cpu(), on_expanded(arguments, expanded, out_dtype))


@pytest.mark.parametrize("per_token_scale", [False, True])
@pytest.mark.parametrize("zero_point", ["none", "one", "per_token"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_epilogue(per_token_scale, zero_point, with_bias, device, generator):
    arguments, expanded = problem(37, 45, 64, 64, generator)
    if not per_token_scale:
        arguments[2] = arguments[2][:1].contiguous()
    if zero_point == "none":
        arguments[7:] = None, None
    if zero_point == "one":
        arguments[7] = arguments[7][:1].contiguous()
    if not with_bias:
        arguments[6] = None
    moved = [None if value is None else value.to(device) for value in arguments]
    y = kernel.launch(*moved, torch.float32)
    assert torch.equal(y.cpu(), on_expanded(arguments, expanded, torch.float32))


@pytest.mark.parametrize("tile", [(16, 64, 0, 4, 2), (64, 16, 0, 4, 3), (128, 64, 0, 8, 2)])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_tile(tile, device, generator):
    arguments, expanded = problem(130, 70, 128, 64, generator)
    y = kernel.launch(*to(device, arguments), torch.float32, config=TileConfig(*tile))
    assert torch.equal(y.cpu(), on_expanded(arguments, expanded, torch.float32))


@pytest.mark.parametrize(
    ("in_features", "group_size", "unit"),
    [
        (1152, 64, 128),
        (4608, 128, 128),
        (1152, 32, 64),
        (1152, 96, 64),
        (192, 64, 64),
        (96, 96, 64),
    ],
)
def test_a_unit_never_straddles_groups(in_features, group_size, unit):
    assert packing.kernel_unit(in_features, group_size) == unit
    halves = range(0, in_features, unit // 2)
    assert all(h // group_size == (h + unit // 2 - 1) // group_size for h in halves)


def test_four_bytes_at_once_never_carry():
    """The assembly of expand_nibbles in 32-bit integers, for every scale, offset and legal code."""
    scale, offset = np.meshgrid(np.arange(1, 18), np.arange(-128, 128), indexing="ij")
    codes = np.random.default_rng(0).integers(0, 16, (*scale.shape, 8, 4))
    codes[..., 0, :], codes[..., 1, :] = 0, 15
    values = codes * scale[..., None, None] + offset[..., None, None]
    legal = (np.abs(values) <= 127).all(axis=-1)  # the packer's promise, for each word of 4 codes
    bytes_to_word = 1 << np.arange(0, 32, 8)
    for high in (False, True):
        word = ((codes << 4 if high else codes) * bytes_to_word).sum(axis=-1)
        nibbles = ((word >> 4) if high else word) & 0x0F0F0F0F
        biased = sum((offset + 128) << shift for shift in (0, 8, 16, 24))[..., None]  # prmt 0
        expanded = ((nibbles * scale[..., None] + biased) ^ 0x80808080) & 0xFFFFFFFF
        got = (expanded[..., None] >> np.arange(0, 32, 8) & 255).astype(np.uint8).view(np.int8)
        assert legal.sum() > 5000
        np.testing.assert_array_equal(got[legal], values[legal])


def test_prepared_weights_are_reused_and_follow_changes(generator):
    w = weights(8, 128, 64, generator)
    parts = (w.packed, w.group_scale, w.group_offset)
    first = prepared_w4.prepared_w4(*parts)
    assert prepared_w4.prepared_w4(*parts) is first
    for part in parts:  # an in-place change of any part is noticed
        before = prepared_w4.prepared_w4(*parts)
        part[0, 0] ^= 1
        after = prepared_w4.prepared_w4(*parts)
        assert after is not before
        same = (
            torch.equal(getattr(after, n), getattr(before, n)) for n in ("split", "scale", "offset")
        )
        assert not all(same)
    other_scale = w.group_scale.clone()  # so is another tensor in its place
    assert prepared_w4.prepared_w4(w.packed, other_scale, w.group_offset) is not after


def test_a_new_tensor_at_an_old_address_is_noticed(generator):
    """Memory is reused: address and version counter alone would match."""
    w = weights(8, 128, 64, generator)
    memory = w.group_scale.numpy().copy()
    first = prepared_w4.prepared_w4(w.packed, torch.from_numpy(memory), w.group_offset)
    memory[:] = 1
    second = prepared_w4.prepared_w4(w.packed, torch.from_numpy(memory), w.group_offset)
    assert not torch.equal(first.scale, second.scale)


def test_a_changed_weight_changes_the_result(device, generator):
    arguments, _ = problem(3, 8, 64, 32, generator)
    arguments = to(device, arguments)
    before = kernel.launch(*arguments, torch.float32)
    arguments[1] ^= 0xFF
    after = kernel.launch(*arguments, torch.float32)
    assert not torch.equal(before, after)
    assert torch.equal(after, reference.gemm_w4a8(*arguments, torch.float32))


def test_prepared_weights_die_with_their_tensor(generator):
    w = weights(8, 128, 64, generator)
    prepared = weakref.ref(prepared_w4.prepared_w4(w.packed, w.group_scale, w.group_offset).split)
    assert prepared() is not None
    del w
    gc.collect()
    assert prepared() is None


def test_another_stream_waits_on_the_device_for_the_one_that_prepared(generator, monkeypatch):
    waits = []

    class Stream:
        def wait_stream(self, other):
            waits.append((self, other))

    first, second = Stream(), Stream()
    w = weights(8, 128, 64, generator)
    parts = (w.packed, w.group_scale, w.group_offset)
    for stream, capturing in ((first, False), (first, False), (second, True), (second, False)):
        monkeypatch.setattr(
            "ditq_kernels.launch.prepared._stream_of", lambda device, now=stream: now
        )
        monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda now=capturing: now)
        prepared_w4.prepared_w4(*parts)
    assert waits == [(second, first)]


def test_inference_tensors_are_prepared_at_every_call(generator):
    with torch.inference_mode():
        w = weights(8, 128, 64, generator)
        parts = (w.packed, w.group_scale, w.group_offset)
        first = prepared_w4.prepared_w4(*parts)
        w.packed.zero_()  # no version counter would tell
        assert int(prepared_w4.prepared_w4(*parts).split.sum()) == 0
        assert int(first.split.sum()) != 0


def test_weights_in_kernel_order_are_read_as_they_are(device, generator):
    for in_features, group_size in ((128, 64), (1152, 96), (192, 64), (256, 128)):
        arguments, expanded = problem(5, 24, in_features, group_size, generator)
        packed, groups = arguments[1], arguments[3:5]
        arguments[1], *arguments[3:5] = arrange("w4p", packed, *groups)
        prepared = prepared_w4.prepared_w4(arguments[1], *arguments[3:5])
        assert prepared.split is arguments[1]
        assert prepared.scale is arguments[3]
        y = kernel.launch(*to(device, arguments), torch.float32)
        assert torch.equal(y.cpu(), on_expanded(arguments, expanded, torch.float32))


DIT_XL = [
    (512, 3456, 1152, 64),
    (8192, 4608, 1152, 64),
    (8192, 1152, 4608, 128),
    (2, 4608, 1152, 32),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "out_features", "in_features", "group_size"), [*DIT_XL, (999, 1000, 992, 32)]
)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_op_on_gpu_equals_w8a8(
    num_tokens, out_features, in_features, group_size, out_dtype, generator
):
    arguments, expanded = problem(num_tokens, out_features, in_features, group_size, generator)
    arguments, expanded = to("cuda", arguments), expanded.cuda()
    *positional, zero_point, weight_sum = arguments
    y = k.gemm_w4a8(*positional, zero_point=zero_point, weight_sum=weight_sum, out_dtype=out_dtype)
    assert torch.equal(y, on_expanded(arguments, expanded, out_dtype))


@pytest.mark.gpu
def test_plain_and_assembly_expansion_agree(generator, monkeypatch):
    arguments, _ = problem(200, 300, 1152, 64, generator)
    arguments = to("cuda", arguments)
    y = kernel.launch(*arguments, torch.float32)
    monkeypatch.setattr(kernel, "INTERPRETED", True)  # compiled, but with the plain twin
    assert torch.equal(kernel.launch(*arguments, torch.float32), y)


@pytest.mark.gpu
def test_capture_needs_a_first_use(generator):
    arguments, expanded = problem(64, 128, 256, 64, generator)
    arguments = to("cuda", arguments)
    kernel.launch(*arguments, torch.float32)  # compiles
    fresh = [value.clone() for value in arguments]
    with (
        pytest.raises(RuntimeError, match="before a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        kernel.launch(*fresh, torch.float32)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.launch(*arguments, torch.float32)
    arguments[0].neg_()
    graph.replay()
    assert torch.equal(y, on_expanded(arguments, expanded.cuda(), torch.float32))

"""W4A8 with a real scale per group: the integer algebra in int64, the order of fp32 sums, the kernel bit for bit."""

import gc
import weakref

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import gemm_w4a8_per_group as kernel
from ditq_kernels._triton.parts import prepared_w4g
from ditq_kernels.codes import packing
from ditq_kernels.launch.tuning import TileConfig
from ditq_kernels.reference import linear as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# one group, whole and paired spans, an odd number of pairs, several chunks a half, K that no group divides
SHAPES = [
    (1, 32, 128, 128), (33, 40, 128, 64), (40, 33, 512, 256), (5, 7, 384, 192), (3, 35, 96, 32),
    (37, 32, 96, 96), (9, 6, 48, 48), (4, 5, 34, 34), (3, 5, 192, 64), (2, 3, 640, 640), (6, 70, 192, 96),
]  # fmt: skip


def problem(num_tokens, out_features, in_features, group_size, generator, extreme=False):
    """Arguments of reference.gemm_w4a8_per_group and launch, without out_dtype."""

    def integers(low, high, *shape):
        values = torch.randint(low, high + 1, shape, generator=generator)
        ends = torch.where(values % 2 == 0, low, high)
        return ends if extreme else values

    shape = (out_features, in_features // group_size)
    codes = integers(0, 15, out_features, in_features).to(torch.uint8)
    zero = integers(0, 15, *shape).to(torch.uint8)
    scale = torch.rand(shape, generator=generator) / 100
    w = k.W4G(k.pack_int4(codes), scale, zero)
    q = integers(-128, 127, num_tokens, in_features).to(torch.int8)
    step = torch.rand(num_tokens, generator=generator) / 100
    zero_point = integers(-128, 127, num_tokens).to(torch.int32)
    bias = torch.randn(out_features, generator=generator)
    return [q, w.packed, step, w.scale, w.weight_zero, bias, zero_point, w.weight_sum()]


def by_numpy(arguments):
    """The definition, from the bytes: int64 sums, then fp32 one step at a time (numpy never fuses)."""
    q, packed, step, scale, zero, bias, zero_point, _ = (
        None if value is None else value.numpy() for value in arguments
    )
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int64)
    codes[:, 0::2], codes[:, 1::2] = packed % 16, packed // 16
    size = codes.shape[1] // scale.shape[1]
    y = np.zeros((len(q), len(codes)), np.float32)
    for j in range(scale.shape[1]):
        part = slice(j * size, (j + 1) * size)
        a = q[:, part].astype(np.int64)
        if zero_point is not None:
            a = a - zero_point.astype(np.int64)[:, None]
        total = a @ (codes[:, part] - zero[:, j : j + 1].astype(np.int64)).T
        y = y + total.astype(np.float32) * scale[:, j]
    y = y * step[:, None]
    return y if bias is None else y + bias


def to(device, arguments):
    return [None if value is None else value.to(device) for value in arguments]


def run(arguments, **options):
    *positional, zero_point, weight_sum = arguments
    return k.gemm_w4a8_per_group(
        *positional, zero_point=zero_point, weight_sum=weight_sum, **options
    )


def test_a_product_by_hand():
    """Two groups of 32: inputs 3 and -2, codes 10 and 1, zero points 8 and 4, steps 1/2 and 2."""
    q = torch.tensor([[3] * 32 + [-2] * 32], dtype=torch.int8)
    codes = torch.tensor([[10] * 32 + [1] * 32], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[8, 4]], dtype=torch.uint8)
    packed, step, bias = k.pack_int4(codes), torch.tensor([0.25]), torch.tensor([1.0])
    # 32 * 3 * 2 = 192 and 32 * -2 * -3 = 192; (192 / 2 + 192 * 2) / 4 + 1 = 121
    assert k.gemm_w4a8_per_group(q, packed, step, scale, zero, bias).tolist() == [[121.0]]
    # inputs minus 5: -2 and -7; 32 * -2 * 2 = -128 and 32 * -7 * -3 = 672; (-64 + 1344) / 4 + 1 = 321
    sums = torch.tensor([[64, -96]], dtype=torch.int32)  # 32 * 2 and 32 * -3
    assert torch.equal(k.W4G(packed, scale, zero).weight_sum(), sums)
    five = torch.tensor([5], dtype=torch.int32)
    y = k.gemm_w4a8_per_group(q, packed, step, scale, zero, bias, zero_point=five, weight_sum=sums)
    assert y.tolist() == [[321.0]]


def test_groups_add_in_ascending_order():
    """2**24 + 1 + 1 in fp32: from the left each 1 is lost; from the right 2**24 + 2 is exact."""
    q = torch.ones(1, 96, dtype=torch.int8)
    codes = torch.tensor([[1] + [0] * 31] * 3, dtype=torch.uint8).reshape(1, 96)
    zero = torch.zeros(1, 3, dtype=torch.uint8)
    for scale, expected in (([2.0**24, 1, 1], 2.0**24), ([1, 1, 2.0**24], 2.0**24 + 2)):
        arguments = (q, k.pack_int4(codes), torch.ones(1), torch.tensor([scale]), zero)
        assert k.gemm_w4a8_per_group(*arguments).item() == expected
        assert kernel.launch(*arguments, None, None, None, torch.float32).item() == expected


@pytest.mark.parity("P5")
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_op_equals_int64_sums(shape, extreme, generator):
    arguments = problem(*shape, generator, extreme)
    assert np.array_equal(run(arguments).numpy(), by_numpy(arguments))


@pytest.mark.parity("P5")
@pytest.mark.parametrize("offset", [-8, 0, 120])
def test_codes_may_be_stored_with_any_offset(offset, generator):
    """The sum over (q - z) (v - w) is that of (q - z) ((v + o) - (w + o)): signed nibbles, or bytes."""
    q, packed, step, scale, zero, _, zero_point, _ = problem(9, 20, 192, 64, generator)
    shifted = k.unpack_int4(packed).long() + offset
    zeros = (zero.long() + offset).repeat_interleave(64, dim=1)
    a = q.long() - zero_point.long()[:, None]
    for group in range(3):
        part = slice(64 * group, 64 * (group + 1))
        only = torch.zeros_like(scale)
        only[:, group] = 1.0
        w = k.W4G(packed, only, zero)
        arguments = [q, packed, torch.ones_like(step), only, zero, None, zero_point, w.weight_sum()]
        total = a[:, part] @ (shifted - zeros)[:, part].t()
        assert torch.equal(run(arguments).long(), total)


@pytest.mark.parity("P5")
def test_the_largest_group_does_not_overflow():
    """All extremes at once: 255 * 15 * K at the last K before int32 ends, rounded up to a multiple of 32."""
    in_features = 561_408
    assert 255 * 15 * in_features < 2**31 <= 255 * 15 * (in_features + 32)
    q = torch.full((1, in_features), 127, dtype=torch.int8)
    packed = torch.full((1, in_features // 2), 0xFF, dtype=torch.uint8)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8)
    low = torch.tensor([-128], dtype=torch.int32)
    sums = torch.tensor([[15 * in_features]], dtype=torch.int32)
    y = k.gemm_w4a8_per_group(q, packed, one[0], one, zero, zero_point=low, weight_sum=sums)
    assert y.item() == float(np.float32(255 * 15 * in_features))
    wide = (torch.cat([q, q[:, :32]], 1), torch.cat([packed, packed[:, :16]], 1))
    with pytest.raises(ValueError, match=r"a group must have at most 561433 inputs .* got 561440"):
        k.gemm_w4a8_per_group(*wide, one[0], one, zero)


@pytest.mark.parity("P7")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("poisoned")
def test_kernel_equals_reference(shape, device, generator):
    arguments = problem(*shape, generator)
    for out_dtype in DTYPES:
        y = kernel.launch(*to(device, arguments), out_dtype)
        assert torch.equal(y.cpu(), reference.gemm_w4a8_per_group(*arguments, out_dtype))


@pytest.mark.usefixtures("poisoned")
def test_kernel_at_the_extremes(device, generator):
    # sums of 1088 inputs may pass 2**22, where the trick with the bit pattern ends
    for group_size in (1024, 1088, 2048):
        arguments = problem(4, 8, group_size, group_size, generator, extreme=True)
        arguments[0], arguments[1] = arguments[0].abs_().clamp_(127), arguments[1] | 0xFF
        arguments[4], arguments[6] = arguments[4] * 0, arguments[6] * 0 - 128
        arguments[7] = torch.full((8, 1), 15 * group_size, dtype=torch.int32)
        y = kernel.launch(*to(device, arguments), torch.float32)
        assert np.array_equal(y.cpu().numpy(), by_numpy(arguments))


@pytest.mark.parametrize("per_token_scale", [False, True])
@pytest.mark.parametrize("zero_point", ["none", "one", "per_token"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_epilogue(per_token_scale, zero_point, with_bias, device, generator):
    arguments = problem(37, 45, 64, 32, generator)
    if not per_token_scale:
        arguments[2] = arguments[2][:1].contiguous()
    if zero_point == "none":
        arguments[6:] = None, None
    if zero_point == "one":
        arguments[6] = arguments[6][:1].contiguous()
    if not with_bias:
        arguments[5] = None
    y = kernel.launch(*to(device, arguments), torch.float32)
    assert np.array_equal(y.cpu().numpy(), by_numpy(arguments))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("tile", [(16, 64, 64, 4, 2), (64, 16, 128, 4, 3), (128, 64, 256, 8, 2)])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_tile(tile, group_size, device, generator):
    arguments = problem(130, 70, 128, group_size, generator)
    y = kernel.launch(*to(device, arguments), torch.float32, config=TileConfig(*tile))
    assert np.array_equal(y.cpu().numpy(), by_numpy(arguments))


def test_rows_of_wider_activations(device, generator):
    arguments = problem(5, 9, 64, 32, generator)
    wide = torch.zeros(5, 100, dtype=torch.int8)
    wide[:, 8:72] = arguments[0]
    expected = by_numpy(arguments)
    arguments[0] = wide[:, 8:72]
    assert np.array_equal(run(arguments).numpy(), expected)
    arguments = [value if i == 0 else value.to(device) for i, value in enumerate(arguments)]
    arguments[0] = wide.to(device)[:, 8:72]
    assert np.array_equal(kernel.launch(*arguments, torch.float32).cpu().numpy(), expected)


def test_four_bytes_at_once_never_borrow():
    """The assembly of unpack_steps in 32-bit integers, for every code beside every other and every zero point."""
    codes = np.stack(np.meshgrid(*[np.arange(16)] * 4, indexing="ij"), -1).reshape(-1, 1, 4)
    zero = np.arange(16)[None, :]
    bytes_to_word = 1 << np.arange(0, 32, 8)
    for high in (False, True):
        word = ((codes << 4 if high else codes) * bytes_to_word).sum(axis=-1)
        nibbles = ((word >> 4) if high else word) & 0x0F0F0F0F
        steps = (((nibbles | 0x80808080) - zero * 0x01010101) & 0xFFFFFFFF) ^ 0x80808080
        got = (steps[..., None] >> np.arange(0, 32, 8) & 255).astype(np.uint8).view(np.int8)
        np.testing.assert_array_equal(got, codes - zero[..., None])


@pytest.mark.parametrize(
    ("group_size", "span"),
    [(128, 128), (64, 64), (32, 64), (96, 192), (256, 256), (48, 64), (70, 128)],
)
def test_half_a_span_lies_in_one_group(group_size, span):
    assert packing.kernel_span(group_size) == span
    assert span % 64 == 0
    assert group_size <= span if group_size % 32 else group_size % (span // 2) == 0


def test_prepared_weights_follow_changes_and_die_with_their_tensor(generator):
    _, packed, _, scale, zero, _, _, sums = problem(1, 8, 128, 64, generator)
    first = prepared_w4g.prepared_w4g(packed, scale, zero, sums)
    assert prepared_w4g.prepared_w4g(packed, scale, zero, sums) is first
    assert prepared_w4g.prepared_w4g(packed, scale, zero, None).sums is None
    for part in (packed, scale, zero, sums):  # an in-place change of any part is noticed
        before = prepared_w4g.prepared_w4g(packed, scale, zero, sums)
        part[0, 0] += 1
        assert prepared_w4g.prepared_w4g(packed, scale, zero, sums) is not before
    kept = weakref.ref(prepared_w4g.prepared_w4g(packed, scale, zero, sums).split)
    del packed, before
    gc.collect()
    assert kept() is None


def test_opcheck(generator):
    arguments = problem(5, 24, 64, 32, generator)
    torch.library.opcheck(torch.ops.ditq.gemm_w4a8_per_group.default, (*arguments, torch.bfloat16))
    bare = (*arguments[:5], None, None, None, torch.float32)
    torch.library.opcheck(torch.ops.ditq.gemm_w4a8_per_group.default, bare)


def test_it_traces_without_graph_breaks(generator):
    arguments = problem(5, 24, 64, 32, generator)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.equal(compiled(arguments), run(arguments))
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(512, 3456, 1152, 128), (4096, 1152, 4608, 128), (999, 1000, 992, 32), *SHAPES]
)
@pytest.mark.usefixtures("poisoned")
def test_op_on_gpu_equals_reference(shape, out_dtype, generator):
    arguments = problem(*shape, generator)
    y = run(to("cuda", arguments), out_dtype=out_dtype)
    assert torch.equal(y.cpu(), reference.gemm_w4a8_per_group(*arguments, out_dtype))


@pytest.mark.gpu
def test_plain_and_assembly_unpacking_agree(generator, monkeypatch):
    arguments = to("cuda", problem(200, 300, 1152, 128, generator))
    y = kernel.launch(*arguments, torch.float32)
    monkeypatch.setattr(kernel, "INTERPRETED", True)  # compiled, but with the plain twin
    assert torch.equal(kernel.launch(*arguments, torch.float32), y)

"""GEMMs with a gated residual, or GELU and a quantizer: oracles in numpy, kernels against the reference."""

import re

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import gemm_gelu_quantize, gemm_residual
from ditq_kernels.launch.tuning import TileConfig
from ditq_kernels.ops import dispatch
from ditq_kernels.reference import fused as reference_fused
from ditq_kernels.reference import linear as reference

# exp2 and x * x run to infinity by design; only the interpreter says so
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = ("w8", "w4p", "w4g")


def problem(weights, num_tokens, out_features, in_features, generator, group_size=32):
    """q, weight, scale and named stages: a grouped bias and a zero point."""
    floats = torch.randn(out_features, in_features, generator=generator)
    quantize = k.quantize_weight_w4g if weights == "w4g" else k.quantize_weight_w4p
    weight = quantize(floats, group_size)
    if weights == "w8":
        weight = k.W8(weight.expand(), weight.scale)
    q = torch.randint(-128, 128, (num_tokens, in_features), generator=generator, dtype=torch.int8)
    scale = torch.rand(num_tokens, generator=generator) / 100
    stages = {
        "bias": torch.randn(3, out_features, generator=generator),
        "bias_index": torch.tensor([2]),
        "zero_point": torch.tensor([7], dtype=torch.int32),
        "weight_sum": weight.weight_sum(),
    }
    return q, weight, scale, stages


def plain(q, weight, scale, stages):
    """The same GEMM in fp32, by the op whose bits other tests pin."""
    if isinstance(weight, k.W4G):
        groups = weight.scale, weight.weight_zero
        return k.gemm_w4a8_per_group(q, weight.packed, scale, *groups, **stages)
    return k.gemm_w8a8(q, weight.expand(), scale, weight.scale, **stages)


def parts_of(weight):
    """Codes, group scale and group offset, as launches take them."""
    if isinstance(weight, k.W8):
        return weight.qweight, None, None
    if isinstance(weight, k.W4G):
        return weight.packed, None, weight.weight_zero
    return weight.packed, weight.group_scale, weight.group_offset


def launch(kernel, device, q, weight, extra, scale, stages, **options):
    """A kernel on the tensors of a public call."""
    names = ("bias", "zero_point", "weight_sum", "bias_index")
    rest = [scale, weight.scale, *(stages.get(name) for name in names), None, None]
    moved = [None if v is None else v.to(device) for v in (q, *parts_of(weight), *extra, *rest)]
    return kernel.launch(*moved, **options).cpu()


def stream(num_tokens, out_features, samples, dtype, generator):
    """A residual in a wider matrix, and gates inside modulation of six parts."""
    residual = torch.randn(num_tokens, out_features + 9, generator=generator).to(dtype)
    modulation = torch.randn(samples, 6 * out_features, generator=generator)
    return residual[:, 5 : 5 + out_features], modulation.chunk(6, dim=1)[2]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_in_numpy(weights, dtype, generator):
    q, weight, scale, stages = problem(weights, 6, 8, 64, generator)
    residual, gate = stream(6, 8, 2, dtype, generator)
    y = plain(q, weight, scale, stages).numpy()
    gates = np.repeat(gate.numpy(), 3, axis=0)
    for factor, options in ((gates, {"gate": gate}), (np.float32(1), {})):
        expected = residual.float().numpy() + factor * y  # fp32: one rounding each
        got = k.gemm_residual(q, weight, scale, residual=residual, **options, **stages)
        assert torch.equal(got, torch.from_numpy(expected).to(dtype))


# tiles inside a sample, across samples, a gate per row, one sample, off-tile, no gates
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("num_tokens", "out_features", "samples"),
    [(64, 40, 2), (70, 37, 5), (9, 33, 9), (1, 1, 1), (70, 37, 0)],
)
@pytest.mark.usefixtures("poisoned")
def test_residual_kernel_equals_reference(
    weights, num_tokens, out_features, samples, device, generator
):
    q, weight, scale, stages = problem(weights, num_tokens, out_features, 96, generator)
    for dtype in (torch.float32, torch.bfloat16):
        residual, gate = stream(num_tokens, out_features, samples, dtype, generator)
        gate = gate if samples else None
        y = launch(gemm_residual, device, q, weight, (residual, gate), scale, stages)
        expected = k.gemm_residual(q, weight, scale, residual=residual, gate=gate, **stages)
        assert torch.equal(y, expected)


# whole and paired spans, an odd number of pairs, one group of any even K, more than a block of inputs
GROUPS = [(192, 64), (64, 32), (96, 32), (96, 96), (34, 34), (512, 256)]


def fp64_of_bytes(q, weight, scale, stages):
    """The layer from the bytes of w4g: integers of each group in int64, everything real in fp64."""
    packed = weight.packed.long()
    codes = torch.stack((packed % 16, packed // 16), dim=2).flatten(1)
    size = codes.shape[1] // weight.scale.shape[1]
    steps = codes - weight.weight_zero.long().repeat_interleave(size, dim=1)
    centred = q.long() - stages["zero_point"].long()
    parts = zip(
        centred.split(size, 1), steps.split(size, 1), weight.scale.double().t(), strict=True
    )
    groups = [(a @ b.t()).double() * step for a, b, step in parts]
    magnitude = sum(group.abs() for group in groups) * scale.double()[:, None]
    bias = stages["bias"].double()[stages["bias_index"]]
    return sum(groups) * scale.double()[:, None] + bias, magnitude + bias.abs(), len(groups)


@pytest.mark.parametrize(("in_features", "group_size"), GROUPS)
@pytest.mark.usefixtures("poisoned")
def test_residual_of_every_group_size(in_features, group_size, device, generator):
    q, weight, scale, stages = problem("w4g", 33, 37, in_features, generator, group_size)
    residual, gate = stream(33, 37, 3, torch.float32, generator)
    got = k.gemm_residual(q, weight, scale, residual=residual, gate=gate, **stages)
    assert torch.equal(
        launch(gemm_residual, device, q, weight, (residual, gate), scale, stages), got
    )
    y, magnitude, groups = fp64_of_bytes(q, weight, scale, stages)
    gates = reference.by_sample(gate, 33).double()
    # each group is rounded as fp32, scaled and added; then scale, bias, gate and residual: 2**-24 of at most all terms
    terms = magnitude * gates.abs() + residual.abs()
    assert ((got - (residual + gates * y)).abs() <= (3 * groups + 4) * 2.0**-24 * terms).all()


def codes_problem(out_features, generator):
    """out_scale, out_zero_point, out_smooth_inv that clip both ends and use every code."""
    smooth_inv = torch.rand(out_features, generator=generator) + 0.5
    return torch.tensor([0.011]), torch.tensor([-110], dtype=torch.int32), smooth_inv


def assert_codes_of_gelu(codes, y, scale, zero_point, smooth_inv):
    """Each code is the nearest one to an fp64 quotient, but for the allowance in the docstring."""
    x = y.double().numpy()
    gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    smooth = np.ones(x.shape[1]) if smooth_inv is None else smooth_inv.double().numpy()
    step, zero = scale.double().item(), zero_point.item()
    exact = np.clip(gelu * smooth / step + zero, -128, 127)
    # GELU errs by 2**-21 |x|; three fp32 roundings by 2**-24 of the quotient each
    allowance = (2.0**-21 * np.abs(x) * smooth + 3 * 2.0**-24 * np.abs(gelu * smooth)) / step
    assert (np.abs(codes.numpy() - exact) <= 0.5 + allowance).all()
    assert np.ptp(codes.int().numpy()) > 100 or codes.numel() < 50


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(("num_tokens", "out_features"), [(64, 40), (33, 37), (1, 1)])
@pytest.mark.usefixtures("poisoned")
def test_gelu_codes(weights, smooth, num_tokens, out_features, device, generator):
    q, weight, scale, stages = problem(weights, num_tokens, out_features, 96, generator)
    out_scale, out_zero, smooth_inv = codes_problem(out_features, generator)
    extra = (out_scale, out_zero, smooth_inv if smooth else None)
    names = dict(zip(("out_scale", "out_zero_point", "out_smooth_inv"), extra, strict=True))
    y = plain(q, weight, scale, stages)
    assert_codes_of_gelu(k.gemm_gelu_quantize(q, weight, scale, **names, **stages), y, *extra)
    got = launch(gemm_gelu_quantize, device, q, weight, extra, scale, stages)
    assert_codes_of_gelu(got, y, *extra)


@pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # exp2 and x * x, interpreted
@pytest.mark.usefixtures("poisoned")
def test_gelu_codes_far_out(device):
    """Both ends of fp32: x on the right, 0 on the left, never NaN."""
    values = torch.tensor([3e38, 1e20, 30.0, -30.0, -1e20, -3e38])
    ones = torch.ones(6)
    weight = k.W8(torch.zeros(6, 32, dtype=torch.int8), ones)
    q = torch.zeros(1, 32, dtype=torch.int8)
    extra = (torch.tensor([0.5]), torch.tensor([-3], dtype=torch.int32), None)
    expected = [[127, 127, 57, -3, -3, -3]]
    stages = {"bias": values}
    got = launch(gemm_gelu_quantize, device, q, weight, extra, ones[:1], stages)
    assert got.tolist() == expected
    public = k.gemm_gelu_quantize(
        q, weight, ones[:1], out_scale=extra[0], out_zero_point=extra[1], **stages
    )
    assert public.tolist() == expected


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_reference_is_the_unfused_ops_bit_for_bit(weights, generator):
    q, weight, scale, stages = problem(weights, 12, 40, 96, generator)
    out_scale, out_zero, smooth_inv = codes_problem(40, generator)
    x = torch.nn.functional.gelu(plain(q, weight, scale, stages), approximate="tanh")
    expected = k.quantize_static(x, out_scale, out_zero, smooth_inv)
    got = k.gemm_gelu_quantize(
        q, weight, scale, out_scale=out_scale, out_zero_point=out_zero, out_smooth_inv=smooth_inv,
        **stages,
    )  # fmt: skip
    assert torch.equal(got, expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_opcheck(weights, generator):
    q, weight, scale, stages = problem(weights, 6, 8, 64, generator)
    parts = parts_of(weight)
    rest = (scale, weight.scale, *(stages[n] for n in ("bias", "zero_point", "weight_sum")))
    rest = (*rest, stages["bias_index"], None, None)
    residual, gate = stream(6, 8, 2, torch.bfloat16, generator)
    for gates in (gate, None):
        torch.library.opcheck(dispatch.gemm_residual.overload, (q, *parts, residual, gates, *rest))
    extra = codes_problem(8, generator)
    torch.library.opcheck(dispatch.gemm_gelu_quantize.overload, (q, *parts, *extra, *rest))


@pytest.mark.parametrize("tile", [(16, 64, 64, 4, 2), (64, 16, 64, 4, 2)])
@pytest.mark.usefixtures("poisoned")
def test_residual_kernel_of_every_tile(tile, device, generator):
    for weights in WEIGHTS:
        q, weight, scale, stages = problem(weights, 128, 70, 64, generator)
        extra = stream(128, 70, 2, torch.float32, generator)
        config = TileConfig(*tile)
        y = launch(gemm_residual, device, q, weight, extra, scale, stages, config=config)
        names = dict(zip(("residual", "gate"), extra, strict=True))
        assert torch.equal(y, k.gemm_residual(q, weight, scale, **names, **stages))


def test_no_tokens(device, generator):
    q, weight, scale, stages = problem("w8", 0, 8, 64, generator)
    extra = codes_problem(8, generator)
    assert launch(gemm_gelu_quantize, device, q, weight, extra, scale, stages).shape == (0, 8)


RESIDUAL_REFUSALS = [
    ({"residual": torch.zeros(6, 9)}, "residual must be [6, 8] as the layer's result, got [6, 9]"),
    ({"residual": torch.zeros(6, 8).double()}, "residual must be [T, N] float32 | float16"),
    ({"gate": torch.zeros(4, 8)}, "gate must have one entry for each sample"),
    ({"gate": torch.zeros(2, 8).half()}, "gate must be [B, N] float32, got [2, 8] float16"),
    ({"scale": torch.ones(5)}, "scale must be [6] or [1] float32"),
]
CODES_REFUSALS = [
    ({"out_scale": torch.ones(6)}, "out_scale must be [1] float32, got [6] float32"),
    ({"out_zero_point": torch.ones(1)}, "out_zero_point must be [1] int32"),
    ({"out_smooth_inv": torch.ones(7)}, "out_smooth_inv must be [8] float32, got [7]"),
]


@pytest.mark.parametrize(
    ("op", "change", "sentence"),
    [("gemm_residual", *case) for case in RESIDUAL_REFUSALS]
    + [("gemm_gelu_quantize", *case) for case in CODES_REFUSALS],
)
def test_what_does_not_fit_is_refused(op, change, sentence, generator):
    q, weight, scale, _ = problem("w8", 6, 8, 64, generator)
    arguments = {"scale": scale, "residual": torch.zeros(6, 8), "gate": torch.zeros(2, 8)}
    if op == "gemm_gelu_quantize":
        out_scale, out_zero, _ = codes_problem(8, generator)
        arguments = {"scale": scale, "out_scale": out_scale, "out_zero_point": out_zero}
    with pytest.raises(ValueError, match=f"^{op}: .*{re.escape(sentence)}"):
        getattr(k, op)(q, weight, **arguments | change)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_of_other_inputs_are_refused(weights, generator):
    q, weight, scale, stages = problem(weights, 6, 8, 64, generator)
    extra = {"residual": torch.zeros(6, 8), "gate": torch.zeros(1, 8)}
    with pytest.raises(ValueError, match="must share K, got K=32 and K=64"):
        k.gemm_residual(q[:, :32], weight, scale, **extra, **stages)


def test_sums_of_rows_in_place_of_groups_are_refused(generator):
    q, weight, scale, stages = problem("w4g", 6, 8, 64, generator)
    stages |= {"weight_sum": weight.weight_sum().sum(dim=1, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"^gemm_residual: weight_sum must be \[N, J\] int32"):
        k.gemm_residual(q, weight, scale, residual=torch.zeros(6, 8), **stages)


def test_real_groups_without_options_and_with_a_branch(device, generator):
    """Symmetric tokens without a bias; integers in every factor of the branch, so that no order of sums rounds."""
    q, weight, _, _ = problem("w4g", 33, 37, 96, generator)
    weight = k.W4G(weight.packed, torch.ones_like(weight.scale), weight.weight_zero)
    factors = [torch.randint(-9, 10, (n, 20), generator=generator).bfloat16() for n in (33, 37)]
    residual, gate = stream(33, 37, 1, torch.float32, generator)
    tail = (torch.ones(1), weight.scale, None, None, None, None)
    for branch in ((None, None), factors):
        arguments = (q, *parts_of(weight), residual, gate, *tail, *branch)
        moved = [None if v is None else v.to(device) for v in arguments]
        expected = reference_fused.gemm_residual(*arguments)
        assert torch.equal(gemm_residual.launch(*moved).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("num_tokens", "samples"), [(512, 2), (999, 3)])
def test_ops_on_gpu(weights, num_tokens, samples, generator):
    q, weight, scale, stages = problem(weights, num_tokens, 1152, 1152, generator)
    extra = stream(num_tokens, 1152, samples, torch.bfloat16, generator)
    names = dict(zip(("residual", "gate"), extra, strict=True))
    y = launch(gemm_residual, torch.device("cuda"), q, weight, extra, scale, stages)
    assert torch.equal(y, k.gemm_residual(q, weight, scale, **names, **stages))
    extra = codes_problem(1152, generator)
    codes = launch(gemm_gelu_quantize, torch.device("cuda"), q, weight, extra, scale, stages)
    assert_codes_of_gelu(codes, plain(q, weight, scale, stages), *extra)


def test_a_gate_s_samples_are_rows_in_order():
    """By hand: two samples of two rows."""
    assert reference.by_sample(torch.tensor([[1.0], [2.0]]), 4).flatten().tolist() == [1, 1, 2, 2]

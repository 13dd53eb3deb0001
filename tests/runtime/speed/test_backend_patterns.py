"""Each rewrite of the compile backend beside the same code run eagerly: equal bits in fp32; it fired, or did not."""

import logging
import operator

import pytest
import torch
import torch.nn.functional as F

import ditq_kernels as k
from ditq_runtime.speed.backend import functional
from ditq_runtime.speed.backend.report import compile_report

SAMPLES, TOKENS, WIDTH = 2, 5, 64
GENERATOR = torch.Generator().manual_seed(0)
SCALE, ZERO = torch.tensor([0.02]), torch.tensor([5], dtype=torch.int32)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


WEIGHT, BIAS, SMOOTH = randn(WIDTH, WIDTH) / 8, randn(WIDTH), torch.rand(WIDTH) + 0.5
MAKE = {
    "w8": k.quantize_weight_w8,
    "w4p": lambda w: k.quantize_weight_w4p(w, 32),
    "w4g": lambda w: k.quantize_weight_w4g(w, 32),
}
LAYERS = {kind: make(WEIGHT) for kind, make in MAKE.items()}
STREAM, X, GATE = (
    randn(SAMPLES, TOKENS, WIDTH),
    randn(SAMPLES, TOKENS, WIDTH),
    randn(SAMPLES, WIDTH),
)
GROUPS = {"bias_index": torch.tensor([1, 0])}


def compiled(function, *arguments):
    """What the compiled function gives, and what was rewritten."""
    torch.compiler.reset()
    options = {"inner": "aot_eager"}
    result = torch.compile(function, backend="ditq", options=options, fullgraph=True)(*arguments)
    return result, dict(compile_report()[-1].fired)


def clones(arguments):
    return [a.clone() for a in arguments]


def check(function, *arguments):
    """Equal to eager, inputs included; returns what was rewritten."""
    eager, seen = clones(arguments), clones(arguments)
    expected = function(*eager)
    result, fired = compiled(function, *seen)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    torch.testing.assert_close(seen, eager, rtol=0, atol=0)
    return fired


def linear(x, kind="w8", bias=BIAS, codes=None, **stages):
    """A linear of ours over the last dimension."""
    rows = x.reshape(-1, WIDTH)
    q, scale, *zero = codes or k.quantize_per_token(rows)
    layer = LAYERS[kind]
    if zero:
        stages |= {"zero_point": zero[0], "weight_sum": layer.weight_sum()}
    stages["out_dtype"] = x.dtype
    if kind == "w8":
        y = k.gemm_w8a8(q, layer.qweight, scale, layer.scale, bias, **stages)
    elif kind == "w4p":
        groups = (layer.group_scale, layer.group_offset)
        y = k.gemm_w4a8(q, layer.packed, scale, *groups, layer.scale, bias, **stages)
    else:
        group = (layer.scale, layer.weight_zero)
        y = k.gemm_w4a8_per_group(q, layer.packed, scale, *group, bias, **stages)
    return y.reshape(*x.shape[:-1], WIDTH)


def asymmetric(x):
    return k.quantize_per_token(x.reshape(-1, WIDTH), asymmetric=True)


RESIDUALS = {
    "gated": lambda h, x, g: h + g[:, None] * linear(x),
    "gate last": lambda h, x, g: linear(x) * g.unsqueeze(1) + h,
    "plain": lambda h, x, g: h + linear(x),
    "diffusers' / 1.0 and dropout": lambda h, x, g: h + F.dropout(linear(x) / 1.0, 0.1, False),
    "w4p, gated": lambda h, x, g: h + g[:, None] * linear(x, "w4p"),
    "w4g, gated": lambda h, x, g: h + g[:, None] * linear(x, "w4g"),
    "w8, a zero point a token": lambda h, x, g: h + linear(x, codes=asymmetric(x)),
    "w4g, a zero point a token": lambda h, x, g: h + linear(x, "w4g", codes=asymmetric(x)),
    "a bias a group": lambda h, x, g: h + linear(x, bias=torch.stack([BIAS, -BIAS]), **GROUPS),
    "a gate for all": lambda h, x, g: h + g[0] * linear(x),
    "a gate a token": lambda h, x, g: h + torch.tanh(h) * linear(x),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_gate_and_residual_enter_the_gemm(name):
    assert check(RESIDUALS[name], STREAM, X, GATE)["gemm_residual"] == 1


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(stream):
    """The sum is fp32, as diffusers writes it for Wan, and cast back: nothing else is rounded."""

    def block(h, x, g):
        return (h.float() + g[:, None] * linear(x)).type_as(h)

    h, x = STREAM.to(stream), X.to(stream)
    result, fired = compiled(block, h, x, GATE)
    q, scale = k.quantize_per_token(x.view(-1, WIDTH))
    rows = h.view(-1, WIDTH)
    expected = k.gemm_residual(q, LAYERS["w8"], scale, BIAS, residual=rows, gate=GATE)
    assert fired["gemm_residual"] == 1
    assert torch.equal(result, expected.view_as(h))


def test_a_sum_that_stays_wide_keeps_a_wide_stream():
    def block(h, x, g):
        return (h + g[:, None] * linear(x)) * 2

    result, fired = compiled(block, STREAM.bfloat16(), X.bfloat16(), GATE)
    assert fired["gemm_residual"] == 1
    assert result.dtype == torch.float32


def _twice(h, x, g):
    y = linear(x)
    return h + g[:, None] * y, y


def _gate_overwritten(h, x, g):
    term = g[:, None] * linear(x)
    g.zero_()
    return h + term


def _in_place_sum(h, x, g):
    alias = h.view(-1)
    h += linear(x)
    return alias * 2


@pytest.mark.parametrize("function", [_twice, _gate_overwritten, _in_place_sum])
def test_no_residual_where_something_else_reads_or_writes(function):
    assert "gemm_residual" not in check(function, STREAM, X, GATE)


def modulated(x, g, weight=None):
    normed = F.layer_norm(x, (WIDTH,), weight, None, 1e-6)
    return normed * (1 + g[:, None]) + g[:, None].tanh()


def quantized(x, **options):
    return k.quantize_per_token(x.reshape(-1, WIDTH), SMOOTH, **options)


def static(x, **options):
    return k.quantize_static(x.reshape(-1, WIDTH), SCALE, ZERO, SMOOTH, **options)


ADALN = {
    "token": lambda x, g: quantized(modulated(x, g)),
    "token, a zero point each": lambda x, g: quantized(modulated(x, g), asymmetric=True),
    "static": lambda x, g: static(modulated(x, g)),
    "for all samples": lambda x, g: quantized(F.layer_norm(x, (WIDTH,)) * g[:1, None] + g[0]),
    "after a cast and a view": lambda x, g: static(
        modulated(x.double().float().float(), g).view(-1)
    ),
}


@pytest.mark.parametrize("name", ADALN)
def test_norm_modulation_and_quantizer_are_one(name):
    assert check(ADALN[name], X, GATE)["adaln_quantize"] == 1


def test_the_cast_before_a_norm_in_fp32_goes():
    def block(x, g):
        return static(modulated(x.float(), g).type_as(x))

    x = X.bfloat16()
    result, fired = compiled(block, x, GATE)
    expected, _, _ = k.adaln_quantize(
        x.view(-1, WIDTH), 1 + GATE, GATE.tanh(), SMOOTH, scale=SCALE, zero_point=ZERO
    )
    assert fired["adaln_quantize"] == 1
    assert torch.equal(result, expected)


def _floats_read_too(x, g):
    y = modulated(x, g)
    return static(y), y * 2


def _scale_overwritten(x, g):
    y = modulated(x, g)
    x.mul_(2)
    return static(y)


KEPT_NORMS = {
    "read as floats too": _floats_read_too,
    "its input is overwritten": _scale_overwritten,
    "weights of its own": lambda x, g: static(modulated(x, g, SMOOTH)),
    "a shift a group": lambda x, g: quantized(modulated(x, g), group_shift=SMOOTH[None]),
    "a scale a head": lambda x, g: k.quantize_static(
        modulated(x, g).view(-1, WIDTH), torch.tensor([0.02, 0.03])
    ),
}


@pytest.mark.parametrize("name", KEPT_NORMS)
def test_a_norm_stays_where(name):
    assert "adaln_quantize" not in check(KEPT_NORMS[name], X, GATE)


def gelu(x):
    return F.gelu(x, approximate="tanh")


GELU = {
    "token": (lambda x: quantized(gelu(x)), "gelu_quantize"),
    "token behind a linear": (lambda x: quantized(gelu(linear(x))), "gelu_quantize"),
    "shifted": (lambda x: quantized(gelu(x), group_shift=SMOOTH[None]), "gelu_quantize"),
    "static": (lambda x: static(F.dropout(gelu(x), 0.0)), "gelu_quantize"),
    "static behind a linear": (lambda x: static(gelu(linear(x))), "gemm_gelu_quantize"),
    "static behind w4g": (lambda x: static(gelu(linear(x, "w4g"))), "gemm_gelu_quantize"),
    "static, shifted": (
        lambda x: static(gelu(linear(x)), group_shift=SMOOTH[None]),
        "gelu_quantize",
    ),
}


@pytest.mark.parametrize("name", GELU)
def test_gelu_and_quantizer_are_one(name):
    function, op = GELU[name]
    fired = check(function, X)
    assert [name for name in fired if "gelu" in name] == [op]
    assert fired[op] == 1


def _gelu_read_too(x):
    y = gelu(x)
    return static(y), y * 2


@pytest.mark.parametrize("function", [lambda x: static(F.gelu(x)), _gelu_read_too])
def test_another_gelu_and_one_that_is_read_stay(function):
    assert "gelu_quantize" not in check(function, X)


def test_linears_of_one_input_quantize_it_once():
    def attention(x):
        return [linear(x, kind) for kind in LAYERS]

    assert check(attention, X) == {"quantize_per_token: shared": 2}


def _set(x):
    x[0] = 1.0


WRITERS = {
    "method": lambda x: x.add_(1),
    "operator": lambda x: operator.iadd(x, 1),
    "item": _set,
    "out": lambda x: torch.add(x, 1, out=x),
    "inplace=True": lambda x: F.silu(x, inplace=True),
    "inplace by place": lambda x: F.relu(x, True),
    "function": lambda x: torch.relu_(x),
    "a view of it": lambda x: x[1:].mul_(3),
    "operator of aten": lambda x: torch.ops.aten.mul_.Tensor(x, x),
}


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_shared_across_what_writes(name):
    def function(x):
        before = quantized(x)
        WRITERS[name](x)
        return before, quantized(x)

    assert check(function, X[0]) == {}


def test_results_that_are_written_into_stay_apart():
    def function(x):
        first, second = quantized(x)[0], quantized(x)[0]
        first.zero_()
        return first, second

    assert check(function, X[0]) == {}


@torch.no_grad()
def test_decompositions_have_the_bits_of_the_ops():
    rows, index, shift = X.view(-1, WIDTH), torch.tensor([1, 0]), randn(2, WIDTH)
    rows[0], rows[1] = 0, 1e-30
    moved = [(None, None), (shift[:1], None), (shift, index)]
    cases = {
        "quantize_per_token": [(rows, s, *m, a) for s in (None, SMOOTH) for m in moved for a in (0, 1)],
        "quantize_static": [
            (rows, s, z, SMOOTH, *m)
            for s, z in ((SCALE, ZERO), (SCALE, None), (torch.rand(4) + 0.1, None))
            for m in moved
        ],
        "gelu_quantize": [
            *((rows, SMOOTH, None, None, *m, a) for m in moved for a in (0, 1)),
            (rows, None, SCALE, ZERO, *moved[2], 0),
        ],
        "adaln_quantize": [
            (rows, GATE, GATE * 2, 1e-6, SMOOTH, *m, *step, dtype, 0)
            for m in (moved[0], moved[2])
            for step, dtype in (((None, None), torch.bfloat16), ((SCALE, ZERO), None))
        ],
    }  # fmt: skip
    assert {f"ditq::{name}" for name in cases} == {op.name() for op in functional.TABLE}
    for op, decomposed in functional.decompositions().items():
        for arguments in cases[op.name().partition("::")[2]]:
            flags = [bool(a) if type(a) is int else a for a in arguments]
            torch.testing.assert_close(decomposed(*flags), op(*flags), rtol=0, atol=0)


def test_wide_rows_keep_the_kernel():
    narrow = functional.decompositions(widest=64)[torch.ops.ditq.quantize_per_token.default]
    assert narrow(torch.empty(3, 65, device="meta"), None) is NotImplemented
    assert narrow(torch.empty(3, 64, device="meta"), None)[0].shape == (3, 64)
    assert narrow(torch.zeros(3, 65), None)[0].shape == (3, 65)  # a CPU has no such limit


BIASES = [BIAS + i for i in range(6)]
TABLES = [torch.stack([bias, -bias]) for bias in BIASES]
SUMS = {kind: layer.weight_sum() for kind, layer in LAYERS.items()}


def side(x, kind="w8", i=0, codes=None, biases=BIASES, **stages):
    """One of several layers of one input, and something that reads it."""
    if codes is not None:
        *codes, zero_point = codes
        stages |= {"zero_point": zero_point, "weight_sum": SUMS[kind]}
    return linear(x, kind, biases and biases[i], codes, **stages) * (i + 2)


TOGETHER = {
    "w8": lambda x: [side(x, i=i) for i in range(3)],
    "w4p": lambda x: [side(x, "w4p", i) for i in range(3)],
    "w4g": lambda x: [side(x, "w4g", i) for i in range(3)],
    "a zero point a token": lambda x: [side(x, i=i, codes=asymmetric(x)) for i in range(2)],
    "w4g, a zero point a token": lambda x: [side(x, "w4g", i, asymmetric(x)) for i in range(2)],
    "a bias a group": lambda x: [
        side(x, i=i, biases=TABLES, **GROUPS) for i in range(2)
    ],
    "a reader in between": lambda x: [side(x), X + 1, side(x, i=1)],
}  # fmt: skip


@pytest.mark.parametrize("name", TOGETHER)
def test_layers_of_one_input_run_in_one_launch(name):
    assert check(TOGETHER[name], X)["gemm_many"] == 1
    assert compile_report()[-1].ops["gemm_many"] == 1
    assert not {"gemm_w8a8", "gemm_w4a8", "gemm_w4a8_per_group"} & set(compile_report()[-1].ops)


def test_at_most_four_layers_run_in_one_launch():
    assert check(lambda x: [side(x, i=i) for i in range(6)], X)["gemm_many"] == 2
    assert "gemm_w8a8" not in compile_report()[-1].ops


def _another_input(x):
    return [side(x), side(x * 2)]


def _another_kind(x):
    return [side(x), side(x, "w4p"), side(x, "w4g")]


def _one_bias(x):
    return [side(x), side(x, biases=None)]


def _bias_is_made_later(x):
    first = side(x)
    return [first, side(x, biases=[first.view(-1, WIDTH)[0].contiguous()])]


def _scales_are_written(x):
    """Between the layers, into what both read."""
    codes = asymmetric(x)
    first = side(x, codes=codes)
    codes[1].mul_(2)
    return [first, side(x, i=1, codes=codes)]


@pytest.mark.parametrize(
    "function", [_another_input, _another_kind, _one_bias, _bias_is_made_later, _scales_are_written]
)
def test_layers_stay_apart(function):
    assert "gemm_many" not in check(function, X)


def test_what_fired_is_reported_and_logged(caplog):
    with caplog.at_level(logging.INFO, "ditq.compile"):
        compiled(lambda x: quantized(gelu(x)), X)
    last = compile_report()[-1]
    assert last.ops == {"gelu_quantize": 1}
    assert last.quantizers_left == 0
    assert caplog.messages == [str(last)]
    assert "gelu_quantize 1 rewritten" in str(last)
    assert "aot_eager" in str(last)

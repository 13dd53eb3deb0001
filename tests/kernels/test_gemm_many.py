"""Layers of one input in one launch: each has the bits of its own GEMM; the kernel against the reference."""

import re

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import gemm_many as kernel
from ditq_kernels.launch.tuning import TileConfig
from ditq_kernels.ops import dispatch

WEIGHTS = ("w8", "w4p", "w4g")
QUANTIZE = {"w4p": k.quantize_weight_w4p, "w4g": k.quantize_weight_w4g}


def weight_of(kind, outputs, inputs, group_size, generator):
    """A layer of a kind."""
    floats = torch.randn(outputs, inputs, generator=generator)
    return k.quantize_weight_w8(floats) if kind == "w8" else QUANTIZE[kind](floats, group_size)


def problem(kind, tokens, widths, generator, inputs=64, group_size=32, samples=1):
    """Arguments of the op by name: grouped biases, and a zero point."""
    made = [weight_of(kind, width, inputs, group_size, generator) for width in widths]
    return {
        "q": torch.randint(-128, 128, (tokens, inputs), generator=generator, dtype=torch.int8),
        "weights": made,
        "scale": torch.rand(1, generator=generator) / 1000 + 0.003,
        "biases": [torch.randn(3, width, generator=generator) for width in widths],
        "zero_point": torch.tensor([7], dtype=torch.int32),
        "weight_sums": [weight.weight_sum() for weight in made],
        "bias_index": torch.randint(0, 3, (samples,), generator=generator),
        "out_dtype": torch.float32,
    }


PLAIN = {"biases": None, "zero_point": None, "weight_sums": None, "bias_index": None}


def apart(arguments):
    """Each layer by the op whose bits other tests pin."""
    found = []
    for i, weight in enumerate(arguments["weights"]):
        bias, weight_sum = (
            each and each[i] for each in (arguments["biases"], arguments["weight_sums"])
        )
        multiply, parts = k.gemm_w8a8, (weight.expand(), arguments["scale"], weight.scale)
        if isinstance(weight, k.W4G):
            multiply = k.gemm_w4a8_per_group
            parts = (weight.packed, arguments["scale"], weight.scale, weight.weight_zero)
        stages = {name: arguments[name] for name in ("zero_point", "bias_index", "out_dtype")}
        found.append(multiply(arguments["q"], *parts, bias, weight_sum=weight_sum, **stages))
    return found


def operands(arguments):
    """What the op under the public function takes, in its order."""
    weights = arguments["weights"]
    codes, scales, offsets = {
        k.W8: ("qweight", "", ""),
        k.W4P: ("packed", "group_scale", "group_offset"),
        k.W4G: ("packed", "", "weight_zero"),
    }[type(weights[0])]
    return [
        arguments["q"],
        [getattr(w, codes) for w in weights],
        [getattr(w, scales) for w in weights] if scales else [],
        [getattr(w, offsets) for w in weights] if offsets else [],
        arguments["scale"], [w.scale for w in weights], list(arguments["biases"] or ()),
        arguments["zero_point"], list(arguments["weight_sums"] or ()), arguments["bias_index"],
        arguments["out_dtype"],
    ]  # fmt: skip


def launch(device, arguments, **options):
    """The kernel on the tensors of a public call."""
    moved = [
        [part.to(device) for part in value] if isinstance(value, list)
        else value.to(device) if isinstance(value, torch.Tensor) else value
        for value in operands(arguments)
    ]  # fmt: skip
    return kernel.launch(*moved, **options)


def assert_same(got, expected):
    """The same bits, contiguous."""
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0)


def test_two_layers_by_hand():
    """Layers of one and of two outputs: (codes - 1) times weights, times 0.5 times the weights' steps, plus biases."""
    q = torch.tensor([[3, -1, 0, 5]], dtype=torch.int8)
    weights = [
        k.W8(torch.tensor([[1, 2, 3, 4]], dtype=torch.int8), torch.tensor([2.0])),
        k.W8(
            torch.tensor([[1, 0, 0, 0], [0, 0, 0, -2]], dtype=torch.int8), torch.tensor([1.0, 4.0])
        ),
    ]
    found = k.gemm_many(
        q, weights, torch.tensor([0.5]), [torch.tensor([10.0]), torch.tensor([0.0, 1.0])],
        zero_point=torch.tensor([1], dtype=torch.int32), weight_sums=[w.weight_sum() for w in weights],
    )  # fmt: skip
    # 2 - 4 - 3 + 16 = 11; 2 and -8
    assert [y.tolist() for y in found] == [[[21.0]], [[1.0, -15.0]]]


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_each_layer_has_the_bits_of_its_own_gemm(kind, out_dtype, generator):
    arguments = problem(kind, 6, (33, 64, 1), generator, samples=2) | {"out_dtype": out_dtype}
    assert_same(k.gemm_many(**arguments), apart(arguments))
    assert_same(k.gemm_many(**arguments), apart(arguments))  # by the plan
    plain = arguments | PLAIN | {"scale": torch.rand(6, generator=generator)}
    assert_same(k.gemm_many(**plain), apart(plain))


def test_sums_in_int64(generator):
    arguments = problem("w8", 5, (16, 48), generator) | PLAIN
    q = arguments["q"].numpy().astype(np.int64)
    for y, weight in zip(k.gemm_many(**arguments), arguments["weights"], strict=True):
        total = q @ weight.qweight.numpy().astype(np.int64).T
        step = (
            arguments["scale"].numpy() * weight.scale.numpy()
        )  # fp32, rounded once, as the product
        assert (y.numpy() == total.astype(np.float32) * step).all()


# one token and one layer; off-tile widths; a tile over three samples; whole tiles; many layers
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(
    ("tokens", "widths", "samples"),
    [(1, (5,), 1), (21, (72, 33, 1), 3), (32, (64, 64), 2), (3, (16, 40, 8, 24, 88, 1, 7, 64), 1)],
)
@pytest.mark.usefixtures("poisoned")
def test_kernel_equals_reference(kind, tokens, widths, samples, device, generator):
    arguments = problem(kind, tokens, widths, generator, samples=samples)
    assert_same(launch(device, arguments), k.gemm_many(**arguments))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.usefixtures("poisoned")
def test_kernel_without_options_in_half_precision(kind, device, generator):
    arguments = problem(kind, 10, (40, 24), generator, inputs=96) | PLAIN
    arguments |= {"scale": torch.rand(10, generator=generator) / 100, "out_dtype": torch.bfloat16}
    assert_same(launch(device, arguments), k.gemm_many(**arguments))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.usefixtures("poisoned")
def test_kernel_with_a_zero_point_a_token(kind, device, generator):
    arguments = problem(kind, 5, (40, 24), generator)
    zero = torch.randint(-128, 128, (5,), generator=generator, dtype=torch.int32)
    arguments |= {"scale": torch.rand(5, generator=generator) / 100, "zero_point": zero}
    assert_same(launch(device, arguments), k.gemm_many(**arguments))


@pytest.mark.parametrize("tile", [(16, 64, 64, 4, 2), (64, 16, 64, 4, 2)])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_tile(tile, device, generator):
    for kind in WEIGHTS:
        arguments = problem(kind, 70, (40, 72), generator, samples=2)
        got = launch(device, arguments, config=TileConfig(*tile))
        assert_same(got, k.gemm_many(**arguments))


@pytest.mark.parametrize(("inputs", "group_size"), [(192, 64), (96, 32), (96, 96), (34, 34)])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_group_size(inputs, group_size, device, generator):
    arguments = problem("w4g", 5, (40, 8), generator, inputs, group_size)
    assert_same(launch(device, arguments), k.gemm_many(**arguments))


def test_weights_in_kernel_order_beside_others(device, generator):
    """The order of a layer's weights is its own."""
    for kind in ("w4p", "w4g"):
        arguments = problem(kind, 5, (40, 8), generator, inputs=128) | PLAIN
        expected = k.gemm_many(**arguments)
        first, second = arguments["weights"]
        arguments["weights"] = [first.arranged(), second]
        assert_same(launch(device, arguments), expected)
        assert_same(k.gemm_many(**arguments), expected)


def test_no_tokens(device, generator):
    assert [y.shape for y in launch(device, problem("w8", 0, (4, 8), generator))] == [
        (0, 4),
        (0, 8),
    ]


@pytest.mark.parametrize(("kind", "options"), [("w8", PLAIN), ("w4p", {}), ("w4g", {})])
def test_opcheck(kind, options, generator):
    arguments = problem(kind, 5, (40, 8), generator) | options
    tests = ("test_schema", "test_faketensor")  # the compile backend has tests of its own
    torch.library.opcheck(dispatch.gemm_many.overload, tuple(operands(arguments)), test_utils=tests)


REFUSALS = [
    ({"weights": []}, "weights must be those of 1 to 8 layers, got 0"),
    ({"scale": torch.ones(9)}, "scale must be [5] or [1] float32, got [9]"),
    ({"biases": [torch.ones(3, 40)]}, "biases must be 2, one for each layer, got 1"),
    ({"biases": [torch.ones(40), torch.ones(8)]}, "with bias_index, bias must be [G, 40] float32, got [40]"),
    ({"weight_sums": None}, "zero_point and weight_sum go together, weight_sum is missing"),
    ({"out_dtype": torch.int8}, "out_dtype must be "),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), REFUSALS)
def test_what_does_not_fit_is_refused(change, sentence, generator):
    arguments = problem("w8", 5, (40, 8), generator) | change
    with pytest.raises(ValueError, match=f"^gemm_many: {re.escape(sentence)}"):
        k.gemm_many(**arguments)


def _strided(first, second):
    wide = torch.zeros(8, 65, dtype=torch.int8)
    return [first, k.W8(wide[:, :64], second.scale)]


DIFFERENT = {
    "another kind": (
        lambda first, second: [first, k.quantize_weight_w4p(torch.ones(8, 64), 32)],
        "weights must be of one kind and group size, got int8 and uint8 in 2 progressive groups",
    ),
    "other groups": (
        lambda first, second: [k.quantize_weight_w4g(torch.ones(8, 64), size) for size in (32, 64)],
        "weights must be of one kind and group size, got uint8 in 2 real groups and uint8 in 1 real groups",
    ),
    "strides": (_strided, "weights must be contiguous, got strides (65, 1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_weights_that_differ_are_refused(name, generator):
    change, sentence = DIFFERENT[name]
    arguments = problem("w8", 5, (40, 8), generator) | PLAIN
    arguments["weights"] = change(*arguments["weights"])
    with pytest.raises(ValueError, match=f"^gemm_many: {re.escape(sentence)}"):
        k.gemm_many(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("widths", [(1152, 1152, 1152), (72, 4608, 1)])
def test_op_on_gpu(kind, widths, generator):
    arguments = problem(kind, 333, widths, generator, inputs=1152, samples=3)
    assert_same(launch(torch.device("cuda"), arguments), k.gemm_many(**arguments))

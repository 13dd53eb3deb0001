"""Queries, keys and values in one GEMM: an oracle in numpy, the unfused ops, the kernel against the reference."""

import re

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import gemm_qkv_quantize as kernel
from ditq_kernels.launch.tuning import TileConfig
from ditq_kernels.ops import dispatch

WEIGHTS = ("w8", "w4p", "w4g")
VALUES = 2


def problem(weights, batch, tokens, heads, head_dim, generator, in_features=64, group_size=32):
    """Arguments of the op by name: grouped biases, zero points, scales that clip a few codes at both ends."""
    out_features = heads * head_dim
    made = []
    for _ in range(3):
        quantize = k.quantize_weight_w4g if weights == "w4g" else k.quantize_weight_w4p
        w4 = quantize(torch.randn(out_features, in_features, generator=generator), group_size)
        made.append(k.W8(w4.expand(), w4.scale) if weights == "w8" else w4)
    shape = (batch * tokens, in_features)
    per_head = [torch.rand(heads, generator=generator) / 50 + 0.04 for _ in range(3)]
    return {
        "q": torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8),
        "weights": tuple(made),
        "scale": torch.rand(1, generator=generator) / 1000 + 0.003,
        "biases": tuple(torch.randn(3, out_features, generator=generator) for _ in range(3)),
        "batch": batch,
        "heads": heads,
        "head_scales": (per_head[0], per_head[1][:1].clone(), per_head[2]),
        "v_zero_point": torch.randint(-9, 9, (heads,), generator=generator, dtype=torch.int32),
        "zero_point": torch.tensor([7], dtype=torch.int32),
        "weight_sums": tuple(weight.weight_sum() for weight in made),
        "bias_index": torch.randint(0, 3, (batch,), generator=generator),
    }


PLAIN = {
    "biases": None,
    "v_zero_point": None,
    "zero_point": None,
    "weight_sums": None,
    "bias_index": None,
}


def floats(arguments, i):
    """The i-th layer in fp32 [B, T, H, D], by the op whose bits other tests pin."""
    weight = arguments["weights"][i]
    bias, weight_sum = (
        three and three[i] for three in (arguments["biases"], arguments["weight_sums"])
    )
    multiply, parts = k.gemm_w8a8, (weight.expand(), arguments["scale"], weight.scale)
    if isinstance(weight, k.W4G):
        multiply = k.gemm_w4a8_per_group
        parts = (weight.packed, arguments["scale"], weight.scale, weight.weight_zero)
    y = multiply(
        arguments["q"], *parts, bias,
        zero_point=arguments["zero_point"], weight_sum=weight_sum, bias_index=arguments["bias_index"],
    )  # fmt: skip
    return y.view(arguments["batch"], -1, arguments["heads"], y.shape[1] // arguments["heads"])


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
        list(arguments["head_scales"]), arguments["v_zero_point"], arguments["batch"], arguments["heads"],
        arguments["scale"], [w.scale for w in weights], list(arguments["biases"] or ()),
        arguments["zero_point"], list(arguments["weight_sums"] or ()), arguments["bias_index"],
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
    """The same codes in the same layout."""
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)
        assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_codes_in_numpy(weights, generator):
    arguments = problem(weights, 2, 5, 3, 32, generator)
    for i, codes in enumerate(k.gemm_qkv_quantize(**arguments)):
        y = floats(arguments, i).numpy().transpose(0, 2, 1, 3)  # [B, H, T, D]
        scale = arguments["head_scales"][i].numpy()[:, None, None]
        zero = arguments["v_zero_point"].numpy()[:, None, None] if i == VALUES else 0
        expected = np.clip(
            np.rint(y * (np.float32(1) / scale)) + zero, -128, 127
        )  # fp32: one rounding each
        assert (codes.numpy() == expected).all()
        assert np.ptp(codes.int().numpy()) > 200


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_reference_is_the_unfused_ops_bit_for_bit(weights, generator):
    """As an attention with static scales quantizes what its projections give it."""
    arguments = problem(weights, 2, 5, 3, 32, generator) | {"v_zero_point": None}
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    for i, codes in enumerate(k.gemm_qkv_quantize(**arguments)):
        y = floats(arguments, i)
        scale = arguments["head_scales"][i].expand(3)
        columns = (torch.ones(3) / scale).repeat_interleave(32)
        expected = k.quantize_static(y.reshape(10, 96), one, zero, columns)
        assert torch.equal(codes, expected.view(y.shape).transpose(1, 2))


def test_layouts(generator):
    query, key, values = k.gemm_qkv_quantize(**problem("w8", 2, 19, 3, 32, generator))
    for codes in (query, key):
        assert codes.shape == (2, 3, 19, 32)
        assert codes.transpose(1, 2).is_contiguous()
    assert values.shape == (2, 3, 19, 32)
    assert values.stride() == (3 * 32 * 32, 32 * 32, 1, 32)  # rows of 19 tokens, padded to 32


# one token; a tile over three images, off-tile outputs; a tile over two; images of whole tiles; few tokens
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim"),
    [(1, 1, 1, 32), (3, 7, 1, 72), (2, 19, 1, 32), (2, 32, 1, 64), (1, 3, 1, 88)],
)
@pytest.mark.usefixtures("poisoned")
def test_kernel_equals_reference(weights, batch, tokens, heads, head_dim, device, generator):
    arguments = problem(weights, batch, tokens, heads, head_dim, generator)
    assert_same(launch(device, arguments), k.gemm_qkv_quantize(**arguments))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.usefixtures("poisoned")
def test_kernel_without_options_and_with_a_scale_per_token(weights, device, generator):
    arguments = problem(weights, 2, 5, 2, 32, generator, in_features=96) | PLAIN
    arguments["scale"] = torch.rand(10, generator=generator) / 100
    assert_same(launch(device, arguments), k.gemm_qkv_quantize(**arguments))


@pytest.mark.parametrize("tile", [(16, 64, 64, 4, 2), (64, 16, 64, 4, 2)])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_tile(tile, device, generator):
    for weights in WEIGHTS:
        arguments = problem(weights, 2, 16, 1, 32, generator)
        got = launch(device, arguments, config=TileConfig(*tile))
        assert_same(got, k.gemm_qkv_quantize(**arguments))


@pytest.mark.parametrize(("in_features", "group_size"), [(192, 64), (96, 32), (96, 96), (34, 34)])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_group_size(in_features, group_size, device, generator):
    arguments = problem("w4g", 2, 5, 1, 40, generator, in_features, group_size)
    assert_same(launch(device, arguments), k.gemm_qkv_quantize(**arguments))


def test_no_tokens(device, generator):
    for codes in launch(device, problem("w8", 2, 0, 1, 32, generator)):
        assert codes.shape == (2, 1, 0, 32)


@pytest.mark.parametrize(("weights", "options"), [("w8", PLAIN), ("w4p", {}), ("w4g", {})])
def test_opcheck(weights, options, generator):
    arguments = problem(weights, 2, 5, 2, 32, generator) | options
    tests = ("test_schema", "test_faketensor")  # compiled blocks have a test of their own
    torch.library.opcheck(
        dispatch.gemm_qkv_quantize.overload, tuple(operands(arguments)), test_utils=tests
    )


def test_attention_reads_the_codes(generator):
    """The layouts fit the op they are for."""
    arguments = problem("w8", 2, 19, 2, 32, generator)
    query, key, values = k.gemm_qkv_quantize(**arguments)
    options = {"v_zero_point": arguments["v_zero_point"], "softmax_scale": 0.2}
    scales = arguments["head_scales"]
    got = k.attention_qk_int8_pv_int8(query, key, values, *scales, **options)
    plain = (codes.contiguous() for codes in (query, key, values))
    assert torch.equal(got, k.attention_qk_int8_pv_int8(*plain, *scales, **options))


REFUSALS = [
    ({"batch": 3}, "batch must divide 10, got 3"),
    ({"batch": 0}, "batch must divide 10, got 0"),
    ({"heads": 5}, "heads must divide 64, got 5"),
    ({"scale": torch.ones(9)}, "scale must be [10] or [1] float32, got [9]"),
    ({"head_scales": (torch.ones(2),) * 2}, "head_scales must be three, of the queries, keys and values, got 2"),
    ({"head_scales": (torch.ones(3),) * 3}, "head_scales must be [1] or [2] float32, got [3]"),
    ({"biases": (torch.ones(64),) * 3}, "with bias_index, bias must be [G, 64] float32, got [64]"),
    ({"v_zero_point": torch.zeros(1)}, "v_zero_point must be [1] or [2] int32, got [1] float32"),
    ({"weight_sums": None}, "zero_point and weight_sum go together, weight_sum is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), REFUSALS)
def test_what_does_not_fit_is_refused(change, sentence, generator):
    arguments = problem("w8", 2, 5, 2, 32, generator) | change
    with pytest.raises(ValueError, match=f"^gemm_qkv_quantize: {re.escape(sentence)}"):
        k.gemm_qkv_quantize(**arguments)


def _narrow(weights):
    return weights[0], weights[1], k.W8(weights[2].qweight[:32], weights[2].scale[:32])


def _strided(weights):
    wide = torch.zeros(64, 65, dtype=torch.int8)
    return weights[0], k.W8(wide[:, :64], weights[1].scale), weights[2]


def _of_another_kind(weights):
    return *weights[:2], k.quantize_weight_w4p(torch.ones(64, 64), 32)


def _of_other_groups(weights):
    return tuple(
        quantize(torch.ones(64, 64), 32)
        for quantize in (k.quantize_weight_w4g, k.quantize_weight_w4g, k.quantize_weight_w4p)
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_narrow, "weights must be of one kind, shape and group size"),
        (_of_another_kind, "weights must be of one kind, shape and group size"),
        (_of_other_groups, "weights must be of one kind, shape and group size"),
        (_strided, "weights must be contiguous, got strides (65, 1)"),
    ],
)
def test_weights_that_differ_are_refused(change, sentence, generator):
    arguments = problem("w8", 2, 5, 2, 32, generator) | PLAIN
    arguments["weights"] = change(arguments["weights"])
    with pytest.raises(ValueError, match=f"^gemm_qkv_quantize: {re.escape(sentence)}"):
        k.gemm_qkv_quantize(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("batch", "tokens"), [(2, 256), (3, 333)])
def test_op_on_gpu(weights, batch, tokens, generator):
    arguments = problem(weights, batch, tokens, 16, 72, generator, in_features=1152)
    assert_same(launch(torch.device("cuda"), arguments), k.gemm_qkv_quantize(**arguments))

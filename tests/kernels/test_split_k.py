"""Programs that share a tile leave the bits of one that computes it alone, for every stage of the epilogue."""

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import gemm_gelu_quantize, gemm_residual, gemm_w4a8, gemm_w8a8
from ditq_kernels.launch.tuning import TileConfig
from ditq_kernels.reference import linear as reference

TOKENS, OUTPUTS = 21, 33  # off-tile; three samples of seven rows
TILE = {"w8": (16, 32, 64, 4, 2), "w4p": (16, 32, 128, 4, 2)}
# an odd count of iterations shared by two, more programs than iterations
CASES = [("w8", 160, 2), ("w8", 64, 4), ("w4p", 192, 2), ("w4p", 128, 4)]

# exp2 runs to infinity by design; only the interpreter says so
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


@pytest.fixture
def operands(generator, device):
    """A function: q, weight parts, and every stage up to the low-rank branch, whose sums are exact."""

    def build(weights, inputs):
        w4 = k.quantize_weight_w4p(torch.randn(OUTPUTS, inputs, generator=generator), 32)
        w8 = w4.expand()
        parts = (
            [w8, None, None] if weights == "w8" else [w4.packed, w4.group_scale, w4.group_offset]
        )
        whole = torch.randint(-4, 5, (TOKENS + OUTPUTS, 16), generator=generator).bfloat16()
        rest = [
            torch.rand(TOKENS, generator=generator) / 100, w4.scale,
            torch.randn(3, OUTPUTS, generator=generator),
            torch.randint(-128, 128, (TOKENS,), generator=generator, dtype=torch.int32),
            w8.sum(1, dtype=torch.int32), torch.tensor([2, 0, 2]), whole[:TOKENS], whole[TOKENS:],
        ]  # fmt: skip
        q = torch.randint(-128, 128, (TOKENS, inputs), generator=generator, dtype=torch.int8)
        return [[v if v is None else v.to(device) for v in part] for part in ([q], parts, rest)]

    return build


def both(weights, splits, launch):
    """The result of one program per tile, and of several."""
    one, several = (TileConfig(*TILE[weights], split_k=count) for count in (1, splits))
    return launch(one), launch(several)


@pytest.mark.parametrize(("weights", "inputs", "splits"), CASES)
def test_plain(weights, inputs, splits, operands):
    (q,), parts, rest = operands(weights, inputs)
    scale, weight_scale, bias, zero_point, weight_sum, *tail = rest
    dequantize = (weight_scale, bias, zero_point, weight_sum, torch.float32, *tail)

    def launch(config):
        if weights == "w8":
            return gemm_w8a8.launch(q, parts[0], scale, *dequantize, config=config)
        packed, *groups = parts
        return gemm_w4a8.launch(q, packed, scale, *groups, *dequantize, config=config)

    expected, got = both(weights, splits, launch)
    assert torch.isfinite(expected).all()
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("weights", "inputs", "splits"), [CASES[0], CASES[2]])
def test_residual(weights, inputs, splits, operands, generator, device):
    q, parts, rest = operands(weights, inputs)
    residual = torch.randn(TOKENS, OUTPUTS, generator=generator).bfloat16().to(device)
    gate = torch.randn(3, OUTPUTS, generator=generator).to(device)
    expected, got = both(
        weights,
        splits,
        lambda config: gemm_residual.launch(*q, *parts, residual, gate, *rest, config=config),
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("weights", "inputs", "splits"), [CASES[0], CASES[2]])
def test_gelu_codes(weights, inputs, splits, operands, generator, device):
    q, parts, rest = operands(weights, inputs)
    scale, zero = (
        torch.tensor([0.05], device=device),
        torch.tensor([-9], dtype=torch.int32, device=device),
    )
    smooth_inv = torch.rand(OUTPUTS, generator=generator).to(device) + 0.5
    quantizer = (scale, zero, smooth_inv)
    expected, got = both(
        weights,
        splits,
        lambda config: gemm_gelu_quantize.launch(*q, *parts, *quantizer, *rest, config=config),
    )
    assert got.dtype == torch.int8
    assert len(got.unique()) > 20
    assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [2, 3, 4, "auto"])
@pytest.mark.parametrize(("weights", "warps"), [("w8", 4), ("w8", 8), ("w4p", 8)])
def test_fc2_on_a_gpu(weights, warps, splits, generator, device):
    q = torch.randint(-128, 128, (512, 4608), generator=generator, dtype=torch.int8).to(device)
    w4 = k.quantize_weight_w4p(torch.randn(1152, 4608, generator=generator).to(device), 64)
    scale = torch.rand(512, generator=generator).to(device) / 100
    config = TileConfig(128, 128, 64 if weights == "w8" else 128, warps, 3, split_k=splits)
    tail = (None, None, None, torch.float32)
    if weights == "w8":
        got = gemm_w8a8.launch(q, w4.expand(), scale, w4.scale, *tail, config=config)
    else:
        parts = (w4.packed, scale, w4.group_scale, w4.group_offset, w4.scale)
        got = gemm_w4a8.launch(q, *parts, *tail, config=config)
    assert torch.equal(got, reference.gemm_w8a8(q, w4.expand(), scale, w4.scale, *tail))

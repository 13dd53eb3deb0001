"""Every GEMM on activations with a zero point per token: definition, CPU backend and kernel against int64."""

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_kernels import _cpu
from ditq_kernels.launch import backend
from ditq_kernels.reference import fused as reference_fused
from ditq_kernels.reference import linear as reference

# exp2 runs to infinity by design; only the interpreter says so
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

TOKENS, OUTPUTS, INPUTS, HEADS = 7, 12, 96, 3
STEP = 256.0  # of the codes that GEMMs give: a power of two, so that dividing by it is exact


class Operands:
    """Codes of asymmetric tokens and one weight, with steps of one: results are the integers themselves."""

    def __init__(self, kind, generator):
        """Kind is w8, w4p or w4g."""
        x = torch.randn(TOKENS, INPUTS, generator=generator) * 3
        x[0], x[1], x[2] = 0, x[1].abs(), -x[2].abs()
        self.q, _, self.zero_point = k.quantize_per_token(x, asymmetric=True)
        floats = torch.randn(OUTPUTS, INPUTS, generator=generator)
        quantize = k.quantize_weight_w4g if kind == "w4g" else k.quantize_weight_w4p
        weight = quantize(floats, 32)
        self.scale = torch.ones(TOKENS)
        if kind == "w4g":
            self.parts = weight.packed, None, weight.weight_zero
            self.weight_scale = torch.ones(weight.scale.shape)
            self.codes = k.expand_w4g(weight.packed, weight.weight_zero)
        else:
            self.codes, self.weight_scale = weight.expand(), torch.ones(OUTPUTS)
            w8 = (self.codes, None, None)
            self.parts = (
                w8 if kind == "w8" else (weight.packed, weight.group_scale, weight.group_offset)
            )
        self.weight_sum = weight.weight_sum()

    @property
    def stages(self):
        """From the scale of the activations on, in the order of the ops."""
        return (
            self.scale, self.weight_scale, None, self.zero_point, self.weight_sum, None, None, None
        )  # fmt: skip

    def sums(self):
        """sum over k of (q - zero_point) * weight in numpy int64."""
        centred = (
            self.q.numpy().astype(np.int64) - self.zero_point.numpy().astype(np.int64)[:, None]
        )
        return centred @ self.codes.numpy().astype(np.int64).T


def run(module, device, *arguments):
    """A launch, or a function of the reference or the CPU backend, on tensors and lists of them."""

    def moved(value):
        if isinstance(value, list):
            return [moved(part) for part in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return module(*map(moved, arguments))


@pytest.fixture(params=["reference", "cpu", "triton"])
def implementation(request, device):
    """The function of an op by name, and its device."""
    places = {"reference": (reference, reference_fused), "cpu": (_cpu,)}

    def find(op):
        if request.param == "triton":
            return backend.load_kernel(op).launch, device
        return next(getattr(m, op) for m in places[request.param] if hasattr(m, op)), "cpu"

    return find


@pytest.mark.parametrize("kind", ["w8", "w4p", "w4g"])
@pytest.mark.usefixtures("poisoned")
def test_gemms_take_out_each_token_s_zero_point(kind, implementation, generator):
    made = Operands(kind, generator)
    exact = made.sums()
    assert np.abs(exact).max() < 2**24  # fp32 holds every sum, also over groups
    op = {"w8": "gemm_w8a8", "w4p": "gemm_w4a8", "w4g": "gemm_w4a8_per_group"}[kind]
    codes, group_scale, offset = made.parts
    middle = {
        "w8": (made.weight_scale,),
        "w4p": (group_scale, offset, made.weight_scale),
        "w4g": (made.weight_scale, offset),
    }[kind]
    function, place = implementation(op)
    plain = (made.q, codes, made.scale, *middle, None, made.zero_point, made.weight_sum)
    y = run(function, place, *plain, torch.float32)
    assert (y.cpu().numpy() == exact).all()
    # the residual stream, and codes of GELU: x or 0 for whole numbers this large, and for 0
    stream = torch.zeros(TOKENS, OUTPUTS)
    function, place = implementation("gemm_residual")
    y = run(function, place, made.q, *made.parts, stream, None, *made.stages)
    assert (y.cpu().numpy() == exact).all()
    function, place = implementation("gemm_gelu_quantize")
    static = torch.tensor([STEP]), torch.tensor([-100], dtype=torch.int32), None
    y = run(function, place, made.q, *made.parts, *static, *made.stages)
    expected = np.clip(np.rint(np.maximum(exact, 0) / STEP) - 100, -128, 127)
    near_zero = np.abs(exact) < 16
    assert (y.cpu().numpy() == expected)[~near_zero].all()
    assert (y.cpu().numpy()[near_zero] == -100).all()
    function, place = implementation("gemm_qkv_quantize")
    lists = [[part] * 3 if part is not None else [] for part in made.parts]
    steps = [torch.full((1,), STEP)] * 3
    heads = run(
        function, place, made.q, *lists, steps, None, 1, HEADS, made.scale, [made.weight_scale] * 3,
        [], made.zero_point, [made.weight_sum] * 3, None,
    )  # fmt: skip
    expected = np.clip(np.rint(exact / STEP), -128, 127).reshape(TOKENS, HEADS, -1)
    for codes in heads:
        assert (codes[0].cpu().numpy() == expected.transpose(1, 0, 2)).all()


@pytest.mark.usefixtures("poisoned")
def test_the_low_rank_branch_does_so_too(generator, device):
    made = Operands("w8", generator)
    down = torch.randint(-2, 3, (5, INPUTS), generator=generator).bfloat16()
    centred = made.q.long() - made.zero_point.long()[:, None]
    expected = (centred @ down.long().t()).float().bfloat16()  # below 2**24: exact until the cast
    arguments = (made.q, down, made.scale, made.zero_point)
    assert torch.equal(k.lora_down(*arguments[:3], zero_point=made.zero_point), expected)
    assert torch.equal(
        run(backend.load_kernel("lora_down").launch, device, *arguments).cpu(), expected
    )


def test_a_layer_of_asymmetric_tokens_is_nearer_to_fp64(generator):
    """Codes of one sign cost symmetric tokens a bit: the worst error of the layer is larger."""
    x = torch.rand(5, 256, generator=generator) + 1
    weight = k.quantize_weight_w8(torch.randn(8, 256, generator=generator))
    exact = x.double() @ (weight.qweight.double() * weight.scale.double()[:, None]).t()
    q, scale = k.quantize_per_token(x)
    symmetric = k.gemm_w8a8(q, weight.qweight, scale, weight.scale)
    q, scale, zero_point = k.quantize_per_token(x, asymmetric=True)
    named = {"zero_point": zero_point, "weight_sum": weight.weight_sum()}
    asymmetric = k.gemm_w8a8(q, weight.qweight, scale, weight.scale, **named)
    errors = [(y.double() - exact).abs() for y in (symmetric, asymmetric)]
    assert errors[1].mean() < 0.7 * errors[0].mean()
    # half a step of each activation, a whole one where its zero point rounds: none is at zero here
    magnitude = (weight.qweight.double() * weight.scale.double()[:, None]).abs().sum(1)
    assert (errors[1] <= scale.double()[:, None] * magnitude).all()

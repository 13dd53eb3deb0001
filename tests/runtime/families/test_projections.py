"""Linears of one input: one op where they are of one kind, and what each makes alone, to the bit, in any case."""

import itertools

import pytest
import torch

from ditq_kernels.ops import dispatch
from ditq_runtime import LayerFormat, QuantLinear
from ditq_runtime.families.projections import in_one_launch, products
from ditq_runtime.format.site import SiteFormat
from ditq_runtime.layers.site import Site

TOKENS, K, WIDTHS = 5, 64, (32, 32, 96)


def layers(formats, dtype=torch.float32):
    """Linears of unlike widths with random tensors, which read one site."""
    generator = torch.Generator().manual_seed(0)
    site = Site(K, SiteFormat(("a",), formats[0].activations), "cpu")
    made = [QuantLinear(K, n, f, dtype, "cpu") for n, f in zip(WIDTHS, formats, strict=True)]
    for module in (site, *made):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                drawn = torch.rand(parameter.shape, generator=generator) + 0.1
            else:
                drawn = torch.randint(1, 7, parameter.shape, generator=generator)
            parameter.data.copy_(drawn)
    for one in made:
        one.read(site)
    return made


@pytest.mark.parametrize(
    ("weights", "activations"),
    [*itertools.product(("w8", "w4p", "w4g"), ("token", "token_asym", "static"))],
)
@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_format_are_one_op(monkeypatch, weights, activations, bias):
    made = layers([LayerFormat(weights, activations, None if weights == "w8" else 32, bias)] * 3)
    codes = made[0].quantize(torch.randn(TOKENS, K, generator=torch.Generator().manual_seed(1)))
    alone = [one.multiply(codes, torch.float32) for one in made]
    called = []
    original = dispatch.gemm_many.implementation
    monkeypatch.setattr(
        type(dispatch.gemm_many), "implementation",
        lambda op, device: called.append(op.name) or original.__func__(op, device),
    )  # fmt: skip
    found = products(made, codes)
    assert called == ["gemm_many"]
    assert [one.shape for one in found] == [(TOKENS, n) for n in WIDTHS]
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))


W8 = LayerFormat("w8", "token")


@pytest.mark.parametrize(
    "formats",
    [
        (W8, W8, LayerFormat("w4p", "token", 32)),
        (W8, LayerFormat("w8", "token", bias=False), W8),
        (LayerFormat("w4p", "token", 64), *[LayerFormat("w4p", "token", 32)] * 2),
        (LayerFormat("w8", "token", lora_rank=4),) * 3,
    ],
    ids=["bits", "bias", "groups", "low rank"],
)
def test_others_run_one_by_one(formats):
    made = layers(formats)
    assert not in_one_launch(made)
    codes = made[0].quantize(torch.randn(TOKENS, K, generator=torch.Generator().manual_seed(1)))
    found = products(made, codes)
    for one, y in zip(made, found, strict=True):
        assert torch.equal(y, one.multiply(codes, torch.float32))


def test_layers_of_two_dtypes_run_one_by_one():
    made = layers([W8] * 3)
    assert in_one_launch(made)
    made[1].bfloat16()
    assert not in_one_launch(made)
    codes = made[0].quantize(torch.ones(TOKENS, K))
    assert [y.dtype for y in products(made, codes)] == [
        torch.float32, torch.bfloat16, torch.float32,
    ]  # fmt: skip

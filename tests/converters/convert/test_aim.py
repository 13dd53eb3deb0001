"""Linears that stand in for packed ones, and rounding that is aimed behind them."""

import sys

import pytest
import torch

from ditq_converters.calibrate.transformer_calls import TransformerCall
from ditq_converters.convert.emulated import Emulated, playable
from ditq_converters.convert.fold import LinearTensors, block_linears, fold_block, output_units
from ditq_converters.convert.prefix import MOST_ROWS, Prefix
from ditq_converters.convert.quantize import quantize_linear
from ditq_converters.methods import Transform
from ditq_runtime.families.dit import BLOCK
from ditq_runtime.format.layer import LayerFormat

WIDTH = 64


@pytest.fixture(scope="module")
def model(make_dit):
    return make_dit(2)


def transforms(seed=0):
    """A factor and a shift for every site of a DiT block, none where no producer takes a shift."""
    generator = torch.Generator().manual_seed(seed)

    def draw(width, shifted):
        smooth = 0.2 + 4 * torch.rand(width, generator=generator, dtype=torch.float64)
        shift = torch.randn(1, width, generator=generator, dtype=torch.float64)
        return Transform(smooth, shift if shifted else None)

    return {
        "qkv": draw(WIDTH, True), "o_proj": draw(WIDTH, True), "fc1": draw(WIDTH, True),
        "fc2": draw(4 * WIDTH, False),
    }  # fmt: skip


def test_the_units_are_those_of_the_fold(model):
    """y' = (y + added) * scale for every linear of a block, where each reads what its fold says. fp64."""
    block, chosen = model.transformer_blocks[0], transforms()
    before, after = block_linears(block, BLOCK), block_linears(block, BLOCK)
    fold_block(after, BLOCK, chosen)
    units = output_units(before, BLOCK, chosen)
    assert set(units) == {"norm1.linear", "attn1.to_v"}
    site = {name: s.name for s in BLOCK.sites for name in s.consumers}
    for name, linear in before.items():
        x = torch.randn(7, linear.weight.shape[1], dtype=torch.float64)
        seen = chosen[site[name]].apply(x, ()) if name in site else x
        y = x @ linear.weight.T + linear.bias[0]
        folded = seen @ after[name].weight.T + after[name].bias[0]
        if name in units:
            y = (y + units[name].added) * units[name].scale
        # sums of 256 terms with factors up to 5 and their inverses: far below 1e-11
        torch.testing.assert_close(folded, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("activations", ["token", "token_asym"])
def test_a_stand_in_computes_what_the_packed_linear_does(activations):
    """Undoing the units of a fine enough weight gives the float linear back, to half a step of the activations."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(1, 32, generator=generator, dtype=torch.float64)
    transform = transforms(2)["qkv"]
    folded = LinearTensors(weight * transform.smooth, bias + transform.shift @ weight.T)
    layer_format = LayerFormat("w8", activations)
    stored = quantize_linear(folded, layer_format)
    layer = playable(WIDTH, 32, layer_format, stored, {})
    x = torch.randn(3, 5, WIDTH, generator=generator) * 2 + 1
    y = Emulated(layer, transform, None)(x)
    rows = transform.apply(x.double().reshape(-1, WIDTH), ())
    shown = (x - transform.shift.float()) * (1 / transform.smooth).float()
    assert torch.equal(y.reshape(-1, 32), layer(shown.reshape(-1, WIDTH)))
    exact = x.double().reshape(-1, WIDTH) @ weight.T + bias
    step = rows.abs().amax(1, keepdim=True) / 127
    real = layer.dequantized_weight().double()
    bound = step * real.abs().sum(1) / 2 + (rows.abs() @ (real - folded.weight).abs().T) + 1e-4
    assert bool(((y.double().reshape(-1, 32) - exact).abs() <= bound).all())


@pytest.fixture
def calls(model):
    generator = torch.Generator().manual_seed(3)
    side = model.config.sample_size

    def one(timestep):
        x = torch.randn(2, model.config.in_channels, side, side, generator=generator)
        told = {"timestep": torch.tensor([timestep] * 2), "class_labels": torch.tensor([1, 2])}
        return TransformerCall("transformer", float(timestep), (x,), told | {"return_dict": False})

    return [one(900), one(100)]


def test_both_models_are_read_at_the_same_tokens(model, calls):
    prefix = Prefix(model, calls)
    read = []
    hook = (
        model.transformer_blocks[1]
        .ff.net[2]
        .register_forward_pre_hook(
            lambda module, args: read.append(args[0].reshape(-1, args[0].shape[-1]))
        )
    )
    for call in calls:
        call.replay(model)
    hook.remove()
    prefix.enter("transformer_blocks.1")
    rows = prefix.rows("ff.net.2")
    wanted, seen = rows.wanted, rows.seen
    assert torch.equal(wanted, torch.cat(read).double())
    assert torch.equal(seen, wanted)
    tokens = len(wanted) // 4  # two calls of two samples; a call of one sample would be of one half
    of_one = [bool((call + sample) % 2) for call in range(2) for sample in range(2)]
    assert rows.half.tolist() == [one for one in of_one for _ in range(tokens)]
    linear = model.transformer_blocks[0].attn1.to_out[0]
    doubled = torch.nn.Linear(linear.in_features, linear.out_features)
    doubled.weight, doubled.bias = torch.nn.Parameter(2 * linear.weight), linear.bias
    prefix.finish("transformer_blocks.0.attn1.to_out.0", doubled)
    prefix.enter("transformer_blocks.1")
    rows = prefix.rows("ff.net.2")
    wanted, seen = rows.wanted, rows.seen
    assert torch.equal(wanted, torch.cat(read).double())
    assert not torch.equal(seen, wanted)
    assert model.transformer_blocks[0].attn1.to_out[0] is linear  # the model is not changed


def test_rows_are_bounded(model, calls, monkeypatch):
    assert MOST_ROWS > 16
    monkeypatch.setattr(sys.modules[Prefix.__module__], "MOST_ROWS", 16)
    prefix = Prefix(model, calls)
    prefix.enter("transformer_blocks.0")
    rows = prefix.rows("attn1.to_q")
    assert len(rows.wanted) == len(rows.seen) == len(rows.half) == 16


def test_no_calls_are_refused(model):
    with pytest.raises(ValueError, match="kept no calls to replay; calibrate again"):
        Prefix(model, [])

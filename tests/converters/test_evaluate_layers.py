"""Errors of forced blocks, and what static ranges cut off."""

from types import SimpleNamespace

import pytest
import torch

from ditq_bench.zoo import CLASSES, quiet
from ditq_converters.calibrate.transformer_calls import TransformerCall
from ditq_converters.evaluate import layer_errors, run
from ditq_converters.evaluate.clipping import ClipCounter, shares
from ditq_converters.evaluate.layer_error import CASCADE, FORCED
from ditq_converters.evaluate.runs import Recorded
from ditq_runtime import LayerFormat, QuantLinear
from ditq_runtime.calls.inputs import gather
from ditq_runtime.format.site import SiteFormat
from ditq_runtime.layers.site import Site

HOW = {"labels": (0, 7, 1), "batch": 2, "steps": 2, "guidance": 2.0, "seed": 1}


@pytest.fixture(scope="module")
def pipe(make_pipeline):
    return make_pipeline()


@pytest.fixture(scope="module")
def model(pipe):
    return pipe.transformer


@pytest.fixture(scope="module")
def calls(pipe):
    return run(pipe, gather("test", pipe, **HOW), few=3).calls


def pair(model, other):
    return {"transformer": model}, {"transformer": other}


def test_a_forced_error_stays_in_the_block_that_makes_it(model, calls, make_dit):
    other = make_dit()
    other.transformer_blocks[0].ff.net[2].weight *= 1.5
    told = []
    forced = layer_errors(FORCED, *pair(model, other), calls, lambda: told.append(1))
    assert forced.mode == FORCED
    assert forced.names == ["transformer_blocks.0", "transformer_blocks.1"]
    assert bool((forced.relative[0] > 1e-3).all())
    assert torch.count_nonzero(forced.relative[1]) == 0  # in cascade it would be hit too
    assert len(told) == 2 * 2  # calls of both inputs
    assert all(not m._forward_hooks for m in [*model.modules(), *other.modules()])
    assert all(not m._forward_pre_hooks for m in [*model.modules(), *other.modules()])
    cascade = layer_errors(CASCADE, *pair(model, other), calls)
    row = cascade.names.index("transformer_blocks.1.ff.net.2")
    assert bool((cascade.relative[row] > 1e-3).all())


@torch.no_grad()
def test_a_forced_error_equals_the_block_called_by_hand(model, calls, make_dit):
    other = make_dit()
    other.transformer_blocks[1].ff.net[2].weight *= 1.5
    seen = []
    hook = model.transformer_blocks[1].register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    )
    for run_of_one in calls:
        run_of_one[0].call.replay(model)
    hook.remove()
    outputs = [(other.transformer_blocks[1](*a, **k), y) for a, k, y in seen]
    noise = sum((yq - y).double().square().sum() for yq, y in outputs)
    signal = sum(y.double().square().sum() for _, y in outputs)
    forced = layer_errors(FORCED, *pair(model, other), calls)
    assert float(forced.relative[1, 0]) == pytest.approx(float((noise / signal).sqrt()), rel=1e-6)
    largest = max(float((yq - y).abs().max()) for yq, y in outputs)
    assert float(forced.max_abs[1, 0]) == pytest.approx(largest, rel=1e-6)


def test_all_measures_of_a_known_error(model, calls, make_dit):
    """The last linear's output is scaled by 1.25: error 0.25, so 12.04 dB, and no angle."""
    other = make_dit()
    last = other.transformer_blocks[1].ff.net[2]
    last.weight *= 1.25
    last.bias *= 1.25
    errors = layer_errors(CASCADE, *pair(model, other), calls)
    assert errors.mode == CASCADE
    row = errors.names.index("transformer_blocks.1.ff.net.2")
    torch.testing.assert_close(
        errors.sqnr_db[row], torch.full((2,), 12.0412).double(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(errors.cosine[row], torch.ones(2).double(), rtol=1e-9, atol=0)
    assert bool((errors.max_abs[row] > 0).all())
    first = errors.names.index("transformer_blocks.0.attn1.to_q")
    assert bool(errors.sqnr_db[first].isinf().all())
    assert errors.max_abs[first].tolist() == [0, 0]


def static_linear(smooth=False):
    layer = QuantLinear(4, 2, LayerFormat("w8", "static"), device="cpu")
    site = Site(4, SiteFormat(("linear",), "static", smooth=smooth), "cpu")
    layer.read(site)
    for parameter in layer.parameters():
        parameter.data.zero_()
    site.act_scale.data.fill_(0.5)
    site.act_zero.data.fill_(-28)
    return layer


class Told(torch.nn.Sequential):
    """Layers behind a timestep, of which the scheme says what carries it."""

    def __init__(self, *layers, carrier="timestep"):
        super().__init__(*layers)
        scheme = SimpleNamespace(timestep=carrier)
        self.config = SimpleNamespace(quantization_config=SimpleNamespace(scheme=scheme))

    def forward(self, x, timestep, sigma=None):
        return super().forward(x)


def test_clipped_inputs_are_counted():
    """Codes -28 + x / 0.5 fit [-128, 127] for x in [-50, 77.5]; 77.7 still rounds to 127."""
    model = Told(static_linear(), torch.nn.Linear(2, 2))
    rows = torch.tensor([[-50.0, -50.6, 77.7, 77.8], [0.0, 1.0, 2.0, 3.0]])
    with ClipCounter({"transformer": model}) as counter:
        assert counter.names == ["0"]
        model(rows, 9.0)
        model(rows[1:], 5.0)
        model(rows[:1], timestep=5.0)  # both forwards together
        model(rows[1:], 1.0)
    assert shares(counter.counted, len(counter.names)).tolist() == [[2 / 8, 2 / 8, 0]]
    assert not model[0]._forward_pre_hooks


def test_calls_are_told_apart_by_the_argument_that_was_traced():
    model = Told(static_linear(), carrier="sigma")
    with ClipCounter({"transformer": model}) as counter:
        model(torch.zeros(1, 4), 3.0, sigma=torch.tensor([0.25, 0.5]))
        model(torch.zeros(1, 4), 3.0)  # it may be left out
    assert [told for told, _ in counter.counted] == [0.5, 3.0]


def test_a_clip_is_judged_after_smoothing():
    layer = static_linear(smooth=True)
    layer.site.smooth_inv.data.copy_(torch.tensor([1.0, 0.1, 10.0, 1.0]))
    model = Told(layer)
    with ClipCounter({"transformer_2": model}) as counter:
        model(torch.tensor([[60.0, 700.0, 10.0, 100.0]]), 1.0)  # 60, 70, 100, 100
    assert counter.names == ["transformer_2.0"]
    assert shares(counter.counted, len(counter.names)).tolist() == [[2 / 4]]


def test_without_static_ranges_there_is_nothing_to_clip(model, calls):
    with ClipCounter({"transformer": model}) as counter:
        calls[0][0].call.replay(model)
    assert counter.names == []
    assert shares(counter.counted, len(counter.names)).shape == (0, 1)


def test_layers_of_a_class_without_a_table_are_found_on_its_first_call():
    """Latte's inputs cannot be made from its configuration; the call that is replayed has them."""
    tiny = CLASSES["LatteTransformer3DModel"]
    model, other = tiny.build(), tiny.build()
    inputs = tiny.inputs(model)
    with quiet():
        call = TransformerCall("transformer", 0.5, (inputs.pop("hidden_states"),), inputs)
        output = call.replay(model)
        with torch.no_grad():
            other.transformer_blocks[0].attn1.to_q.weight *= 1.25
        found = layer_errors(CASCADE, *pair(model, other), [[Recorded(call, output)]])
    scaled = {name for name in found.names if name.endswith("to_v")}
    assert scaled == set()  # V carries folds; where a row knows no folds it would compare
    row = found.names.index("transformer_blocks.0.attn1.to_q")
    assert float(found.relative[row, 0]) > 0.1

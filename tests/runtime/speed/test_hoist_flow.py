"""Hoisted modulation of Flux and SD3: the same latents, one table a run; their schedulers announce nothing."""

import copy

import pytest
import torch

import ditq_runtime as ditq
from ditq_bench.zoo import PIPELINES
from ditq_converters import Recipe, convert
from ditq_runtime.families import family_of
from ditq_runtime.layers.linear import QuantLinear

STEPS = 3
CALLS = {
    "Flux": {"guidance_scale": 3.0},
    "Flux with a negative prompt": {"negative_prompt": "blurred", "true_cfg_scale": 2.0},
    "SD3": {"guidance_scale": 4.0},
}


@pytest.fixture(scope="module")
def packed():
    """Name of a pipeline -> it, with a packed transformer."""
    made = {}

    def get(name):
        if name not in made:
            pipe = made[name] = PIPELINES[name].build()
            pipe.transformer = convert(
                pipe.transformer, Recipe("linear", "w8", "token"), quiet=True
            )
        return made[name]

    return get


def sample(pipe, steps=STEPS, **options):
    generator = torch.Generator().manual_seed(0)
    told = {"height": 16, "width": 16, "max_sequence_length": 16, "output_type": "latent"}
    return pipe("a red fox", num_inference_steps=steps, generator=generator, **told, **options)[0]


def rows_of(model):
    """How many rows each modulation linear of a block gets, call by call."""
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and "blocks" in name and "norm" in name:
            module.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    return seen


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("call", CALLS)
def test_hoisted_flow_models_give_the_same_bits(packed, call):
    pipe, options = packed(call.split()[0]), CALLS[call]
    expected, shorter = sample(pipe, **options), sample(pipe, steps=2, **options)
    prepared = ditq.prepare(pipe)
    seen = rows_of(pipe.transformer)
    forwards = 2 if "negative" in call else 1  # a step: it calls the model twice, with two prompts
    assert torch.equal(sample(pipe, **options), expected)
    assert (prepared.hoist.tables, prepared.hoist.hits) == (forwards, STEPS * forwards)
    samples = 2 if call == "SD3" else 1  # guided in one batch
    assert set(seen) == {STEPS * samples}
    assert len(seen) == forwards * len(prepared.hoist.holders)
    assert torch.equal(sample(pipe, steps=2, **options), shorter)
    assert prepared.hoist.tables == 2 * forwards
    blocks = len(ditq.execution_report(pipe.transformer).blocks)
    assert ditq.execution_report(pipe.transformer).totals["hoisted_blocks"] == blocks
    prepared.undo()
    assert torch.equal(sample(pipe, **options), expected)


def test_a_call_of_ones_own_in_the_middle_of_a_run_computes_its_own(packed):
    """Flux notes where its loop is; who calls the model with another timestep meanwhile gets that one's modulation."""
    pipe = packed("Flux")
    prepared = ditq.prepare(pipe)
    inputs = _example(pipe.transformer)
    with torch.no_grad():
        expected = pipe.transformer(**inputs)[0]
    found = []

    def between(pipe, step, timestep, kwargs):
        with torch.no_grad():
            found.append(pipe.transformer(**inputs)[0])
        return kwargs

    hits = prepared.hoist.hits
    sample(pipe, callback_on_step_end=between)
    assert prepared.hoist.hits == hits + STEPS
    assert all(torch.equal(one, expected) for one in found)
    prepared.undo()


def _example(model):
    return family_of(type(model).__name__).example_inputs(model) | {
        "timestep": torch.tensor([0.123]),
        "return_dict": False,
    }


def test_prepare_says_what_it_did_and_refuses_a_second_time(packed):
    pipe = packed("SD3")
    prepared = ditq.prepare(pipe)
    hoist, compiled, graph = str(prepared).splitlines()
    assert hoist == "hoist: yes, modulation is computed once a run"
    assert compiled == f"compile: no, {len(pipe.transformer.transformer_blocks)} blocks run fused"
    assert graph == "graph: no, the transformer is on cpu"
    with pytest.raises(ValueError, match="is prepared already"):
        ditq.prepare(pipe)
    prepared.undo()
    ditq.prepare(pipe, compile=False, cuda_graph=False).undo()


def test_a_copy_of_a_prepared_model_takes_no_pipeline_along(packed):
    pipe = packed("SD3")
    prepared = ditq.prepare(pipe)
    seen = []
    pipe.__class__ = type("Watched", (type(pipe),), {"__deepcopy__": lambda *_: seen.append(1)})
    copy.deepcopy(pipe.transformer)
    pipe.__class__ = type(pipe).__bases__[0]
    prepared.undo()
    assert not seen

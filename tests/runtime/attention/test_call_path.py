"""Folds through V: another processor that may add values is refused by one sentence; those that mix V run."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from ditq_runtime.attention.call_path import guard_values
from ditq_runtime.families import family_of

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "version1"


class Adds(AttnProcessor2_0):
    """A stranger's, which may add what it likes."""


class AddsToBoth(JointAttnProcessor2_0):
    """The same for two streams."""


class AddsToFlux(FluxAttnProcessor):
    """The same for Flux."""


CASES = {
    "dit_htg": ("transformer_blocks.1.attn1", Adds),
    "pixart": ("transformer_blocks.0.attn2", Adds),
    "sd3": ("transformer_blocks.0.attn", AddsToBoth),
    "flux": ("single_transformer_blocks.0.attn", AddsToFlux),
}


def load(name):
    folder = FIXTURES / name
    told = json.loads((folder / "expected.json").read_text())
    model = getattr(diffusers, told["class"]).from_pretrained(folder / "transformer")
    inputs = family_of(told["class"]).example_inputs(model)

    def run():
        with torch.no_grad():
            return model(**inputs)[0]

    return model, run


@pytest.mark.parametrize("name", CASES)
def test_another_processor_is_refused_by_name(name):
    model, run = load(name)
    where, kind = CASES[name]
    attn = model.get_submodule(where)
    expected, stock = run(), attn.processor
    attn.processor = kind()
    with pytest.raises(ValueError, match=rf"attn.*: its processor is a {kind.__name__}, and a fac"):
        run()
    attn.processor = stock
    assert torch.equal(run(), expected)


def test_an_ip_adapter_of_sd3_is_refused():
    model, run = load("sd3")
    attn = model.transformer_blocks[1].attn
    attn.processor = SD3IPAdapterJointAttnProcessor2_0(64, 32, 2)
    with pytest.raises(
        ValueError, match=r"is a SD3IPAdapterJoint.* --method linear, which folds no"
    ):
        run()


def test_where_nothing_is_folded_any_may_run_and_those_that_mix_always():
    model, run = load("dit_token")  # its first block is folded nowhere
    model.transformer_blocks[0].attn1.processor = Adds()
    run()
    model, run = load("dit_htg")
    expected = run()
    for block in model.transformer_blocks:
        block.attn1.processor = AttnProcessor()
    got = run()  # another order of sums moves codes now and then
    assert float((got - expected).norm() / expected.norm()) < 0.05


def test_a_block_that_is_the_attention():
    """As the face adapter of Wan Animate is: the producers stand in the block itself."""
    block = Attention(query_dim=64, heads=2, dim_head=32)
    guard_values(block, ["to_v"])
    x = torch.zeros(1, 3, 64)
    assert block(x).shape == x.shape
    block.set_processor(Adds())
    with pytest.raises(ValueError, match="Attention: its processor is a Adds, and a factor"):
        block(x)

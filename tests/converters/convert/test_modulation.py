"""Inputs of modulation that need no calibration: those of a real forward, for every class, and good for new ones."""

import pytest
import torch

from ditq_converters.convert.modulation import LABELS, TIMESTEPS, made_inputs

NAME = "transformer_blocks.1.norm1.linear"


@pytest.fixture(scope="module")
def model(make_dit):
    made = make_dit(2)
    table = made.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight
    table[20:1000] = table[1000]  # what was never trained
    return made


def test_they_are_what_a_forward_shows(model):
    """Every class that is embedded in a way of its own, and as often none, at timesteps from 999 to 0."""
    rows, timesteps = made_inputs(model, NAME)
    assert rows.shape == (TIMESTEPS * 2 * LABELS, 64)
    assert timesteps[0] == 999
    assert timesteps[-1] == 0
    asked = torch.cat([torch.arange(10), torch.full((10,), 1000), torch.arange(10, 20)])
    size = model.config.sample_size
    told = timesteps[:30]
    read = []
    linear = model.get_submodule(NAME)
    hook = linear.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model(torch.zeros(30, model.config.in_channels, size, size), told, asked)
    hook.remove()
    # the same sums of fp32, perhaps in another order
    torch.testing.assert_close(rows[:30], read[0], rtol=1e-5, atol=1e-6)
    null = rows[LABELS : 2 * LABELS]
    assert torch.equal(null, null[:1].expand_as(null))


def test_a_block_that_is_told_its_embedding_has_none(model):
    assert made_inputs(model, "proj_out_1") is None
    assert made_inputs(model.to("meta"), NAME) is None

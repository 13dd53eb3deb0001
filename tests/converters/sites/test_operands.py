"""Q, K and V of attentions: told where they can run quantized, left out where a mask differs from query to query."""

import pytest

from ditq_bench.zoo import CLASSES, quiet
from ditq_converters import StatisticsError, calibrate, convert
from ditq_converters.plan.recipe import Recipe


@pytest.fixture(scope="module")
def chroma(tmp_path_factory):
    """Chroma masks pairs of tokens; its own statistics."""
    tiny = CLASSES["ChromaTransformer2DModel"]
    model = tiny.build().requires_grad_(False)
    inputs = tiny.inputs(model)
    folder = tmp_path_factory.mktemp("chroma") / "stats"
    with quiet():
        return model, calibrate(model, folder, run=lambda m: m(**inputs), rows=0, quiet=True)


def test_a_mask_per_query_leaves_its_attention_out_and_nothing_else(chroma):
    model, stats = chroma
    assert stats.has_attention
    low, high = stats.ranges("transformer_blocks.0.attn_to_q")
    assert bool((low < high).all())
    with pytest.raises(StatisticsError, match=r"cannot read transformer_blocks.0.attn.q"):
        stats.ranges("transformer_blocks.0.attn.q")
    with quiet():
        packed = convert(model, recipe(), stats, quiet=True)
    assert not packed.config.quantization_config.scheme.attention


def test_static_scales_of_such_an_attention_are_refused(chroma):
    model, stats = chroma
    asked = recipe(attention="int8", attention_scales="static")
    wanted = "a mask per query or head has none, and stays float"
    with quiet(), pytest.raises(StatisticsError, match=wanted):
        convert(model, asked, stats, quiet=True)


def recipe(**choices):
    return Recipe.of(method="smoothquant", **choices)

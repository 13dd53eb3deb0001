"""What is discovered on a forward, beside the tables that were written by hand from the papers and diffusers' code."""

import pytest
import torch

from ditq_bench.zoo import CLASSES, quiet
from ditq_converters import calibrate
from ditq_converters.sites.find import family_for, find_sites
from ditq_runtime.families import FAMILIES, OnTheFly, ValueRows

NAMES = ("dit", "pixart-alpha", "pixart-sigma", "sd3", "sd3.5", "flux-schnell", "flux-dev")


@pytest.fixture(scope="module", params=NAMES)
def both(request, make_case):
    """Name, model, the table of its class, what is discovered."""
    model, inputs = make_case(request.param)
    return request.param, model, FAMILIES[type(model).__name__], find_sites(model, inputs)


def test_the_same_sites_with_the_same_producers(both):
    """By hand AdaLN absorbs transforms in a forward of our own; for a stock forward their place is the quantizer."""
    _, model, by_hand, found = both
    tables = found.block_tables(model)
    assert list(tables) == list(by_hand.block_tables(model))
    for block, table in by_hand.block_tables(model).items():
        mine = {frozenset(site.consumers): site for site in tables[block].sites}
        assert set(mine) == {frozenset(site.consumers) for site in table.sites}
        for site in table.sites:
            other = mine[frozenset(site.consumers)]
            assert len(other.observed) == len(site.observed)
            assert set(site.streams) <= set(other.observed)
            assert told(other.producer) == told(site.producer)


def told(producer):
    """What a producer says, without the words of its reason."""
    if isinstance(producer, ValueRows):
        return set(producer.values), producer.rest is None, producer.takes_shift
    return producer.kind if isinstance(producer, OnTheFly) else "X"


def test_modulation_is_told_by_what_it_reads(both):
    _, model, by_hand, found = both
    for block, table in found.block_tables(model).items():
        assert set(table.modulations) == set(by_hand.block_tables(model)[block].modulations)


def test_the_rest_stays_float_for_its_reason(both):
    name, model, by_hand, found = both
    listed = {
        f"{block}.{linear}"
        for block, table in by_hand.block_tables(model).items()
        for linear in table.linears
    }
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(found.kept) == linears - listed
    timestep = next(n for n in found.kept if n.endswith("timestep_embedder.linear_1"))
    assert found.why_kept(timestep).startswith("embedder: one row per sample")
    assert found.timestep_argument == "timestep", name


def test_what_follows_the_timestep_may_shift_with_it(make_case):
    """Image tokens of PixArt's blocks do; the caption, which attention reads as it came, does not."""
    model, inputs = make_case("pixart-sigma")
    (table, *_) = find_sites(model, inputs).block_tables(model).values()
    assert {site.name for site in table.sites if not site.timed} == {"attn2_to_k"}


def test_a_class_with_a_table_keeps_it(make_case):
    model, inputs = make_case("flux-dev")
    assert family_for(model, inputs) is FAMILIES["FluxTransformer2DModel"]


def test_a_model_is_asked_for_inputs_once():
    model = CLASSES["OmniGenTransformer2DModel"].build()
    with pytest.raises(ValueError, match="pass its keyword arguments as inputs"):
        family_for(model)
    found = family_for(model, CLASSES["OmniGenTransformer2DModel"].inputs(model))
    assert family_for(model) is found


def test_a_model_of_many_blocks_is_found_by_two(make_case):
    model, inputs = make_case("pixart-sigma")
    deep = type(model).from_config({**model.config, "num_layers": 5}).to("meta")
    family = find_sites(deep, inputs)
    assert family.block_names(deep) == [f"transformer_blocks.{i}" for i in range(5)]
    assert len({id(table) for table in family.block_tables(deep).values()}) <= 2


def test_inputs_that_do_not_run_are_refused(make_case):
    model, inputs = make_case("dit")
    wrong = {**inputs, "hidden_states": inputs["hidden_states"][:, :3]}
    with pytest.raises(ValueError, match="DiTTransformer2DModel: a forward on these inputs failed"):
        find_sites(model, wrong)


def test_calibration_finds_sites_on_the_first_call_where_no_inputs_can_be_made(tmp_path):
    tiny = CLASSES["OmniGenTransformer2DModel"]
    model = tiny.build()
    inputs = tiny.inputs(model)
    with quiet():
        stats = calibrate(model, tmp_path / "stats", run=lambda m: m(**inputs), rows=0, quiet=True)
    family = family_for(model)
    for block, table in family.block_tables(model).items():
        for site in table.sites:
            width = model.get_submodule(f"{block}.{site.consumers[0]}").in_features
            assert stats.ranges(f"{block}.{site.name}")[0].shape == (1, width)
    assert any(len(site.consumers) > 1 for site in table.sites)

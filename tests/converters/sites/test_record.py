"""A discovered family survives JSON."""

import json

import pytest

from ditq_bench.zoo import CLASSES
from ditq_converters.sites import find_sites
from ditq_converters.sites.record import from_record, to_record


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "AnyFlowTransformer3DModel"])
def test_a_family_comes_back_as_it_was(name):
    model = CLASSES[name].build()
    family = find_sites(model, CLASSES[name].inputs(model))
    record = json.loads(json.dumps(to_record(family, model)))
    again = from_record(record)
    assert again.block_tables(model) == family.block_tables(model)
    assert (again.architecture, again.kept) == (family.architecture, family.kept)
    assert again.timestep_argument == family.timestep_argument
    assert again.why_no_timestep == family.why_no_timestep
    assert len(record["tables"]) < len(record["blocks"])

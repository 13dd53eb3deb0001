"""Inputs made from a signature and a configuration."""

import pytest
import torch

from ditq_bench.zoo import CLASSES
from ditq_converters.sites.inputs import forward_inputs
from ditq_converters.sites.trace import run_wide
from ditq_converters.sites.twin import make_twin, widen


@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", "ZImageTransformer2DModel", "WanTransformer3DModel"]
)
def test_a_forward_runs_on_inputs_of_another_width_than_any_guess(name):
    twin = make_twin(CLASSES[name].build())
    inputs = forward_inputs(twin)
    assert all(torch.isfinite(x).all() for x in run_wide(twin, widen(inputs)))
    assert inputs.keys() >= set(CLASSES[name].inputs(twin)) - {"guidance"}


def test_what_no_name_tells_is_asked_for():
    twin = make_twin(CLASSES["OmniGenTransformer2DModel"].build())
    with pytest.raises(
        ValueError, match=r"OmniGenTransformer2DModel: .* pass its keyword arguments"
    ):
        forward_inputs(twin)

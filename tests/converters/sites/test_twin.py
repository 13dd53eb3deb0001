"""A twin has the blocks of the configuration, two per list, and no idle parameter."""

import torch
from torch import nn

from ditq_bench.zoo import CLASSES
from ditq_converters.sites.twin import make_twin, widen


def test_a_twin_of_a_model_without_weights():
    model = CLASSES["FluxTransformer2DModel"].build()
    deep = type(model).from_config({**model.config, "num_layers": 7}).to("meta")
    twin = make_twin(deep)
    assert [len(twin.transformer_blocks), len(twin.single_transformer_blocks)] == [2, 2]
    assert len(make_twin(deep, full_depth=True).transformer_blocks) == 7
    for name, parameter in twin.named_parameters():
        assert parameter.dtype == torch.float64
        assert bool((parameter != 0).all()), name
        if parameter.dim() == 1:
            assert float((parameter - 1).abs().min()) > 0.05, name
    random = torch.random.get_rng_state()
    make_twin(model)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"width": 4}
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        @classmethod
        def from_config(cls, config):
            return cls()

    twin = make_twin(Tied())
    assert twin.a.weight is twin.b.weight


def test_inputs_are_widened_wherever_they_stand():
    inputs = {"x": [torch.zeros(2, dtype=torch.float16)], "y": ({"z": torch.zeros(2).long()}, 3)}
    wide = widen(inputs)
    assert wide["x"][0].dtype == torch.float64
    assert wide["y"][0]["z"].dtype == torch.int64
    assert wide["y"][1] == 3

import pytest
import torch
from torch import nn

from ditq_converters.sites.first_call import first_call
from ditq_converters.sites.inputs import NoInputs


class Model(nn.Module):
    ran = 0

    def forward(self, x, timestep=None, return_dict=True):
        self.ran += 1
        return x


def test_the_arguments_of_the_first_call_by_name():
    model, x = Model(), torch.zeros(2)

    def run():
        model(x, timestep=3, return_dict=False)
        model(x, timestep=2)

    assert first_call(model, run) == {"x": x, "timestep": 3}
    assert model.ran == 0
    run()  # the hook is gone
    assert model.ran == 2


def test_errors_of_the_run_are_its_own_and_no_call_is_told():
    with pytest.raises(NoInputs, match="Model: was not called"):
        first_call(Model(), lambda: None)
    with pytest.raises(ZeroDivisionError):
        first_call(Model(), lambda: 1 / 0)

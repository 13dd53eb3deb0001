"""Calibration of pipelines that no table knows: two transformers, image-to-image, editing, ControlNets."""

import pytest
import torch

from ditq_bench.zoo.pipelines import PIPELINES
from ditq_converters import calibrate

# pipeline -> timesteps of each transformer, in its own units: strength 0.6 begins late, Z-Image is told 1 - t
SEEN = {
    "Wan22": {"transformer": 1, "transformer_2": 1},
    "FluxImg2Img": {"transformer": 3},
    "FluxKontext": {"transformer": 2},
    "FluxControlNet": {"transformer": 2},
    "ZImage": {"transformer": 2},
}


@pytest.mark.parametrize("name", SEEN)
def test_a_pipeline_is_calibrated_on_its_own_calls(name, tmp_path):
    """Its text encoders are gone then, and every kept call gives what the model gives."""
    pipe, outputs = PIPELINES[name].build(), []
    models = {component: getattr(pipe, component) for component in SEEN[name]}
    for model in models.values():
        model.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    calls = list(PIPELINES[name].calls)
    stats = calibrate(pipe, tmp_path, calls, rows=4, quiet=True, free_text_encoders=True)
    assert {c: stats.of(c).calls for c in stats.components} == SEEN[name]
    assert pipe.text_encoder is None
    ran = list(outputs)
    for component, model in models.items():
        for call in stats.of(component).replay():
            found = call.replay(model)
            found = found[0] if isinstance(found, list) else found
            same = [o[0] if isinstance(o, list) else o for o in ran]
            assert any(found.shape == o.shape and torch.equal(found, o) for o in same)


def test_noise_falls_along_the_calls_whatever_the_model_is_told(tmp_path):
    pipe = PIPELINES["ZImage"].build()
    stats = calibrate(pipe, tmp_path, list(PIPELINES["ZImage"].calls), rows=0, quiet=True)
    assert stats.timesteps == [0.0, 0.5]

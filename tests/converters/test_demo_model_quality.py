"""On the trained demo models the packed ones keep the signal, and smoothing earns its place."""

import pytest

from ditq_converters import Recipe, calibrate, convert, open_model
from ditq_converters.evaluate import compare_runs, run
from ditq_converters.showcase.score import Baseline
from ditq_runtime.calls.pipeline import with_transformers

STEPS, SAMPLES, GUIDANCE = 20, 20, 1.5


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """name -> (statistics, float run), made once; judged on other noise than calibrated on."""
    made, how = {}, {"steps": STEPS, "guidance": GUIDANCE}

    def get(name):
        if name not in made:
            pipe, folder = open_model(name), tmp_path_factory.mktemp("stats")
            stats = calibrate(pipe, folder, samples=SAMPLES, batch=SAMPLES, quiet=True, **how)
            made[name] = stats, Baseline.of(name, pipe, SAMPLES, SAMPLES, 1, **how)
        return made[name]

    return get


def mean_sqnr(study, **recipe):
    stats, baseline = study
    packed = convert(baseline.pipe, Recipe(**recipe), stats, quiet=True)
    pipe = with_transformers(baseline.pipe, {"transformer": packed})
    return compare_runs(baseline.run, run(pipe, baseline.inputs)).mean


@pytest.mark.parametrize(("weights", "least"), [("w8", 35.0), ("w4p", 25.0)])
def test_smoothquant_keeps_the_signal(study, weights, least):
    """35 dB is an error of 1.8 % of the noise prediction, 25 dB of 5.6 %."""
    assert mean_sqnr(study("demo:digits"), weights=weights) >= least


@pytest.mark.parametrize("weights", ["w8", "w4p"])
def test_smoothing_wins_where_channels_are_salient(study, weights):
    smooth, linear = (
        mean_sqnr(
            study("demo:digits-salient"), method=method, weights=weights, activations="static"
        )
        for method in ("smoothquant", "linear")
    )
    assert smooth >= linear + 10

"""On the trained demo models the packed ones keep the signal, and smoothing earns its place."""

import pytest

from ditq_converters import Recipe, calibrate, convert, open_model
from ditq_converters.calibrate.run import draw_labels, make_scheduler
from ditq_converters.calibrate.trajectory import SamplingPlan
from ditq_converters.evaluate import forced_sqnr, run

STEPS, SAMPLES, GUIDANCE = 20, 20, 1.5


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """name -> (pipeline, statistics, plan, float calls), made once; judged on other noise than calibrated on."""
    made = {}

    def get(name):
        if name not in made:
            pipe = open_model(name)
            folder = tmp_path_factory.mktemp("stats")
            stats = calibrate(pipe, folder, STEPS, SAMPLES, GUIDANCE, quiet=True)
            labels = draw_labels(list(range(10)), SAMPLES, seed=1)
            plan = SamplingPlan(labels, steps=STEPS, guidance=GUIDANCE, seed=1)
            calls = run(pipe.transformer, make_scheduler(pipe, "ddim"), plan)
            made[name] = pipe, stats, plan, calls
        return made[name]

    return get


def mean_sqnr(study, **recipe):
    pipe, stats, plan, calls = study
    return forced_sqnr(calls, convert(pipe, Recipe(**recipe), stats, quiet=True), plan).mean


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

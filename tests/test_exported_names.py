"""The public names, written out: adding or dropping one is a decision, so it changes this file too."""

import inspect

import pytest

import ditq_converters
import ditq_runtime

EXPORTED = {
    ditq_runtime: [
        "FORMAT_VERSION",
        "CheckpointError",
        "DitqConfig",
        "DitqQuantizer",
        "ExecutionReport",
        "FallbackError",
        "LayerFormat",
        "LayerRun",
        "Prepared",
        "QuantLinear",
        "Scheme",
        "configure",
        "execution_report",
        "load_lora",
        "prepare",
        "push_to_hub",
        "register",
        "unload_lora",
    ],
    ditq_converters: [
        "CalibrationStats",
        "Recipe",
        "StatisticsError",
        "calibrate",
        "convert",
        "evaluate",
        "open_model",
    ],
}


@pytest.mark.parametrize("package", EXPORTED, ids=lambda package: package.__name__)
def test_the_names_are_these(package):
    assert package.__all__ == EXPORTED[package]


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package, names in EXPORTED.items() for name in names],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_name_exists_and_says_what_it_is(package, name):
    value = getattr(package, name)
    if name == "FORMAT_VERSION":
        assert value == 1
        return
    # a class inherits its base's docstring through inspect.getdoc: look at its own
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}(")  # what a dataclass writes by itself
    if inspect.isfunction(value):
        documented = value.__doc__
        for parameter in inspect.signature(value).parameters:
            assert parameter in documented, f"{name} does not explain {parameter}"
    assert inspect.getmodule(value).__name__.startswith(package.__name__)


@pytest.mark.parametrize("package", EXPORTED, ids=lambda package: package.__name__)
def test_the_package_says_what_it_is(package):
    assert package.__doc__

"""The public names, written out: adding or dropping one is a decision, so it changes this file too."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ditq_converters
import ditq_runtime

EXPORTED = {
    ditq_runtime: [
        "FORMAT_VERSION",
        "CheckpointError",
        "CompiledGraph",
        "DitqConfig",
        "DitqQuantizer",
        "ExecutionReport",
        "FallbackError",
        "LayerFormat",
        "LayerRun",
        "Prepared",
        "QuantLinear",
        "Scheme",
        "__version__",
        "compile_report",
        "configure",
        "execution_report",
        "load_lora",
        "prepare",
        "push_to_hub",
        "register",
        "set_lora",
        "unload_lora",
    ],
    ditq_converters: [
        "CalibrationStats",
        "Plan",
        "Recipe",
        "StatisticsError",
        "auto_plan",
        "calibrate",
        "convert",
        "evaluate",
        "make_plan",
        "open_model",
        "read_plan",
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
        assert value == 2
        return
    if name == "__version__":
        assert value
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
def test_every_name_has_a_home_and_a_type(package):
    """Names load when they are used; type checkers read the imports that never run."""
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = (part for part in tree.body if isinstance(part, ast.If))
    typed = {
        alias.name: part.module
        for part in block.body
        if isinstance(part, ast.ImportFrom)
        for alias in part.names
    }
    assert typed == {name: f"{package.__name__}.{home}" for name, home in package._HOME.items()}
    assert list(package._HOME) == package.__all__


def test_functions_win_over_the_wings_that_bear_their_names():
    """`ditq_converters.convert` is the function, whatever was imported before."""
    program = (
        "import ditq_converters.convert.fold, ditq_converters.calibrate.stats, ditq_converters.evaluate.sqnr\n"
        "import ditq_converters as c\n"
        "assert callable(c.convert) and callable(c.calibrate) and callable(c.evaluate)\n"
        "from ditq_converters import convert\n"
        "assert convert is c.convert\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("package", EXPORTED, ids=lambda package: package.__name__)
def test_the_package_says_what_it_is(package):
    assert package.__doc__

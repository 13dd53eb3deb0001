"""The example of docs/plan.md, installed as a package of its own and used as any method."""

import importlib
import json
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from ditq_converters import calibrate, convert, make_plan
from ditq_converters.cli.plan import plan
from ditq_converters.methods import METHODS
from ditq_converters.plugins import found_methods

PAGE = (Path(__file__).parents[3] / "docs" / "plan.md").read_text()


def block(language, begin):
    """The code block of the page that begins so."""
    (found,) = re.findall(rf"```{language}\n({re.escape(begin)}.*?)```", PAGE, re.DOTALL)
    return found


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with the example, as an installer leaves it."""
    site = tmp_path / "site-packages"
    info = site / "median_smoothing-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "median_smoothing.py").write_text(block("python", '"""SmoothQuant with the median'))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: median-smoothing\nVersion: 1.0\n")
    entries = block("toml", "[project.entry-points").replace('"', "")
    entries = entries.replace("[project.entry-points.ditq.methods]", "[ditq.methods]")
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    yield
    with suppress(KeyError):
        del METHODS["median"]
    sys.modules.pop("median_smoothing", None)


def test_the_example_is_short():
    assert len(block("python", '"""SmoothQuant with the median').splitlines()) <= 34


def test_a_package_brings_a_method(installed, make_dit, inputs, tmp_path):
    assert list(found_methods())[-1] == "median"
    assert "median" in METHODS
    model = make_dit()
    stats = calibrate(model, tmp_path / "stats", steps=3, samples=2, quiet=True)
    chosen = make_plan(model, stats, method="median", strength=0.7, keep=("*.ff.net.2",))
    packed = convert(model, chosen, stats, tmp_path / "out", quiet=True)
    recipe = packed.config.quantization_config.recipe
    assert (recipe["method"], recipe["source"]) == (
        "median",
        "an example; round-to-nearest, no transform",
    )
    low, high = stats.ranges("transformer_blocks.0.qkv")
    a = torch.maximum(low.abs(), high.abs()).double().median(0).values
    attention = model.transformer_blocks[0].attn1
    readers = (attention.to_q, attention.to_k, attention.to_v)
    w = torch.cat([reader.weight.double() for reader in readers]).abs().amax(0)
    scale = packed.transformer_blocks[0].ditq_sites["qkv"].scale.double()
    torch.testing.assert_close(scale, a**0.7 / w**0.3, rtol=1e-6, atol=0)
    with torch.no_grad():
        truth, ours = model(**inputs(model)).sample, packed(**inputs(model)).sample
    assert 0 < float((ours - truth).norm() / truth.norm()) < 0.05


def test_the_command_line_knows_it_too(installed, tmp_path):
    app = typer.Typer()
    app.command()(plan)
    arguments = ["demo:digits", "--method", "median", "--set", "*:strength=0.7"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    sites = json.loads((tmp_path / "plan.json").read_text())["sites"].values()
    assert {(site["method"], site["options"]["strength"]) for site in sites} == {("median", 0.7)}


def test_an_entry_point_that_gives_no_method_is_refused(installed, tmp_path):
    (tmp_path / "site-packages" / "median_smoothing.py").write_text("MEDIAN = 3\n")
    with pytest.raises(ValueError, match=r"median_smoothing:MEDIAN should be a Method named 'med"):
        METHODS["median"]

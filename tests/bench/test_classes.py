"""Six classes of the zoo a day through the converter and a new process; in twelve days all of them."""

import datetime

import pytest

from ditq_bench.classes.again import check_again
from ditq_bench.classes.sweep import REFUSED, Converted, Row, block_parameters, sweep
from ditq_bench.classes.table import markdown, write_csv
from ditq_bench.zoo import CLASSES
from ditq_converters.sites import find_sites

A_DAY = 6
RECIPES = ("linear-w8", "smoothquant-w4p-gptq", "htg-w8-static")  # of those that the table has
EXCEPTIONS = {  # class -> least share of integers, and why it is less than 0.95
    "NucleusMoEImageTransformer2DModel": 0.70,  # its experts are no linears
    "SanaWMLTX2RefinerTransformer3DModel": 0.35,  # its audio linears are read by no forward
}


def todays():
    names = list(CLASSES)
    first = datetime.date.today().toordinal() * A_DAY
    return [names[(first + i) % len(names)] for i in range(A_DAY)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    rows = {name: sweep(CLASSES[name], folder / name, RECIPES) for name in todays()}
    return rows, check_again(folder)


def test_all_are_found_proven_stored_and_loaded(swept):
    rows, again = swept
    for name, row in rows.items():
        assert row.failed == "", name
        assert row.sites > 0
        assert row.proof <= 1e-10, name
        for recipe, done in row.recipes.items():
            if REFUSED in done.failed:
                assert not row.timestep.isidentifier()
                continue
            assert done.failed == "", (name, recipe)
            assert done.integers >= EXCEPTIONS.get(name, 0.95), (name, recipe)
            assert 0 < done.error < 0.5
            assert again[name][recipe] == "", (name, recipe)


def test_the_table_and_the_csv_hold_every_class(swept, tmp_path):
    rows, _ = swept
    broken = Row("Broken", failed="ValueError: no inputs")
    half = Row(
        "Half", recipes={r: Converted(failed="other bits" * (r == "linear-w8")) for r in RECIPES}
    )
    table = markdown([*rows.values(), broken, half], RECIPES)
    assert all(f"| `{name}` |" in table for name in rows)
    assert "* `Broken`: ValueError: no inputs" in table
    assert "* `Half`: linear-w8: other bits" in table
    write_csv(tmp_path / "c.csv", [*rows.values(), broken], "abc1234")
    lines = (tmp_path / "c.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(row.recipes) for row in rows.values()) + 1
    assert all(line.endswith(",abc1234") for line in lines[1:])


def test_experts_count_and_embedders_in_blocks_do_not():
    moe, dit = (CLASSES[f"{n}Transformer2DModel"] for n in ("NucleusMoEImage", "DiT"))
    model = moe.build()
    counted = dict(block_parameters(model, find_sites(model, moe.inputs(model))))
    experts = {name: n for name, n in counted.items() if "experts" in name}
    assert experts == {n: p.numel() for n, p in model.named_parameters() if "experts" in n}
    model = dit.build()
    counted = dict(block_parameters(model, find_sites(model, dit.inputs(model))))
    assert not [name for name in counted if "timestep_embedder" in name]
    assert "transformer_blocks.1.norm1.linear" in counted

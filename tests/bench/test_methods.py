"""The study resumes where it was, and its tables say what its rows say."""

from PIL import Image

from ditq_bench.method_tables import chart, tables
from ditq_bench.methods import ABLATED, FIELDS, METHOD_NAMES, MODELS, cases, read_rows, write_rows
from ditq_converters.methods import METHODS


def row(**changes):
    base = dict.fromkeys(FIELDS, "0")
    base |= {"model": "demo:digits", "table": "methods", "case": "htg", "weights": "w4p"}
    return {**base, "activations": "static", "bytes": "1234567", **changes}


def test_every_method_is_studied_in_every_setting():
    assert set(METHOD_NAMES) == set(METHODS)
    found = [case for case in cases(MODELS) if case.table == "methods"]
    settings = {(c.model, c.name, c.recipe.weights, c.recipe.activations) for c in found}
    assert len(settings) == len(found) == 3 * len(METHOD_NAMES) * 4
    assert {case.model for case in cases(MODELS) if case.table == "ablations"} == set(ABLATED)


def test_rows_survive_the_disk(tmp_path):
    rows = [row(sqnr_free_db="33.25"), row(case="ditas: TAS + grid", table="ablations")]
    write_rows(tmp_path / "methods.csv", rows)
    assert read_rows(tmp_path / "methods.csv") == rows
    assert read_rows(tmp_path / "other.csv") == []


def test_tables_show_both_figures_and_leave_gaps_open():
    text = tables(
        [
            row(sqnr_free_db="33.26", sqnr_forced_db="34.01", psnr_db="35.1", accuracy="1.0"),
            row(table="ablations", case="htg: both", sqnr_free_db="1.04", sqnr_forced_db="-0.61"),
        ]
    )
    assert "| htg |  |  | 33.3 / 34.0 |  | 35.1 dB, 1.00, 1,234,567, 0 s |" in text
    assert "| htg: both | 1.0 / -0.6 |" in text


def test_the_chart_is_an_image(tmp_path):
    chart(tmp_path / "chart.png", [row(sqnr_free_db="33.26")])
    with Image.open(tmp_path / "chart.png") as image:
        assert len(image.convert("L").getcolors(256)) > 10

"""The study resumes where it was, and its tables say what its rows say."""

from PIL import Image

from ditq_bench.browser import faults, find_browser
from ditq_bench.frontier import FIELDS as AUTO_FIELDS
from ditq_bench.jitter import FIELDS as JITTER_FIELDS
from ditq_bench.method_tables import chart, tables
from ditq_bench.methods import ABLATED, FIELDS, METHOD_NAMES, MODELS, cases, read_rows, write_rows
from ditq_bench.plots import Place, _unbeaten
from ditq_bench.study_page import STUDIES, write_study_page
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


def test_what_no_smaller_one_beats_by_hand():
    places = [
        Place("m", "k", size, db) for size, db in ((2, 30), (1, 20), (3, 25), (1, 19), (4, 31))
    ]
    assert [(p.megabytes, p.decibels) for p in _unbeaten(places)] == [(1, 20), (2, 30), (4, 31)]


def test_every_study_has_a_page_that_fits(tmp_path):
    """With its rows, who measured them, and pictures where there are bytes; pages of a folder link each other."""
    fields = {"auto": AUTO_FIELDS, "jitter": JITTER_FIELDS}
    for kind, study in STUDIES.items():
        rows = [
            dict.fromkeys(fields.get(kind, FIELDS), "7") | row(case=case, commit="abc1234")
            for case in ("smoothquant w4p", "ditas w8", "auto 45%")
        ]
        rows = [
            r | {"sqnr_guided_db": "41", "sqnr_forced_db": "40", "commits": "abc1234"} for r in rows
        ]
        page = write_study_page(tmp_path, kind, rows).read_text()
        assert page.count("<tr>") == 1 + len(rows)
        assert study.about.split(":")[0] in page
        assert "abc1234" in page
        assert ("1,234,567" in page) == ("bytes" in study.columns)
        assert (tmp_path / f"{kind}-digits.png").exists() == (kind in ("methods", "flow", "auto"))
    assert 'href="methods.html"' in (tmp_path / "profiles.html").read_text()
    browser = find_browser()
    assert browser is None or faults(tmp_path / "auto.html", browser) == []

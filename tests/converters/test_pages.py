"""What all report pages share: tables that fit, colours that tell apart."""

import pytest

from ditq_bench.browser import MISSING, faults, find_browser
from ditq_converters.pages.colours import colours_of
from ditq_converters.pages.template import Heading, table, write_page


@pytest.mark.skipif(find_browser() is None, reason=MISSING)
def test_a_table_of_many_columns_is_cut_off_nowhere(tmp_path):
    """One of four long columns is seen to be; one of more becomes a list where it does not fit."""
    for count, cut in ((4, True), (9, False)):
        columns = [f"a_rather_long_heading_{i}" for i in range(count)]
        page = tmp_path / f"{count}.html"
        write_page(
            tmp_path, Heading("t", "m"), [table(columns, [["1"] * count])], [], {}, page.name
        )
        assert any("table is cut off" in fault for fault in faults(page, find_browser())) == cut


def test_names_of_a_figure_have_a_colour_each():
    """More candidates than a palette has; names with fixed colours that are alike too."""
    names = [f"candidate {i}" for i in range(60)] + [
        "torch fp32",
        "torch fp32 linear",
        "W8A8",
        "free",
    ]
    colours = colours_of(names)
    assert list(colours) == names
    assert len(set(colours.values())) == len(names)
    assert colours["W8A8"] == colours_of(["W8A8"])["W8A8"]

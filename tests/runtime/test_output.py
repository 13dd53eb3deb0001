"""Tables that never break a word or a number, wide or stacked."""

from ditq_runtime.cli.output import shown, table_lines

COLUMNS = ("layer", "bytes", "why")
ROWS = [["blocks.0.attn1.to_q", 1234567, "folded into AdaLN"], ["blocks.0.ff.net.2", 5, ""]]


def test_numbers_stand_right_and_words_left():
    assert table_lines(COLUMNS, ROWS, None) == [
        "layer                    bytes  why",
        "-------------------  ---------  -----------------",
        "blocks.0.attn1.to_q  1,234,567  folded into AdaLN",
        "blocks.0.ff.net.2            5",
    ]


def test_a_terminal_that_is_too_narrow_gets_a_line_a_value():
    assert table_lines(COLUMNS, ROWS, 40) == [
        "layer  blocks.0.attn1.to_q",
        "bytes  1,234,567",
        "why    folded into AdaLN",
        "",
        "layer  blocks.0.ff.net.2",
        "bytes  5",
    ]


def test_a_terminal_that_is_just_wide_enough_gets_the_table():
    wide = table_lines(COLUMNS, ROWS, None)
    assert table_lines(COLUMNS, ROWS, max(map(len, wide))) == wide
    assert table_lines(COLUMNS, ROWS, max(map(len, wide)) - 1) != wide


def test_no_rows_leave_the_headings():
    assert table_lines(COLUMNS, [], None) == ["layer  bytes  why", "-----  -----  ---"]


def test_columns_are_dropped_before_rows_are_stacked():
    narrow = table_lines(COLUMNS, ROWS, 31, ("why",))
    assert narrow == table_lines(COLUMNS[:2], [row[:2] for row in ROWS], None)
    assert table_lines(COLUMNS, ROWS, 200, ("why",)) == table_lines(COLUMNS, ROWS, None)
    assert "why" not in "".join(table_lines(COLUMNS, ROWS, 12, ("why",)))  # dropped, then stacked


def test_text_that_is_a_figure_stands_right_too():
    lines = table_lines(
        ("measure", "dB"), [["free", "46.30"], ["forced", "-"], ["psnr", "8.1"]], None
    )
    assert lines[2:] == ["free     46.30", "forced       -", "psnr       8.1"]


def test_no_figure_is_written_with_an_exponent_for_being_in_the_thousands():
    assert [shown(x) for x in (4070.2, 999.4, 0.0123, 12345, "a\nb")] == [
        "4,070", "999", "0.0123", "12,345", "a b",
    ]  # fmt: skip


def test_a_long_value_of_a_stacked_row_goes_on_below_its_beginning():
    lines = table_lines(("a", "why"), [("1", "no word of this sentence is broken")], 20)
    assert lines == ["a    1", "why  no word of this", "     sentence is", "     broken"]

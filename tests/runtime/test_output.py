"""Tables that never break a word or a number, wide or stacked."""

from ditq_runtime.cli.output import table_lines

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

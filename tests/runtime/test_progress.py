"""What long work says where stderr is no terminal."""

from ditq_runtime.cli.progress import EVERY, Lines, progress_bar


def test_a_line_now_and_then_and_one_at_the_end(capsys):
    seconds = iter([0.0, EVERY / 2, EVERY, EVERY * 1.5, EVERY * 2])
    lines = Lines("working", 4, 0, lambda: next(seconds))
    for _ in range(4):
        lines.advance()
    assert capsys.readouterr().err.splitlines() == [
        "working: 2 of 4, 0:00:15 so far, 0:00:15 to go",
        "working: 4 of 4, 0:00:30 so far, 0:00:00 to go",
    ]


def test_a_resumed_run_reckons_with_its_own_steps(capsys):
    seconds = iter([0.0, 60.0])
    lines = Lines("working", 10, 8, lambda: next(seconds))
    lines.advance()  # one step took a minute, one is left
    assert capsys.readouterr().err == "working: 9 of 10, 0:01:00 so far, 0:01:00 to go\n"


def test_quiet_says_nothing(capsys):
    with progress_bar("working", 1, quiet=True) as advance:
        advance()
    assert capsys.readouterr().err == ""


def test_a_redirected_run_says_that_it_ended(capsys):
    with progress_bar("working", 1) as advance:
        advance()
    assert capsys.readouterr().err.startswith("working: 1 of 1, ")

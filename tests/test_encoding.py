"""Text files are read and written in UTF-8, whatever the locale says: every call that opens one names the encoding."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("ditq_runtime", "converters", "bench", "kernels")
SOURCES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
TEXT = {"read_text", "write_text"}


def text_calls(tree):
    """Lines of calls that open a text file without naming its encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        called = node.func
        method = called.attr if isinstance(called, ast.Attribute) else None
        if method in TEXT or (opens_file(called) and "b" not in mode_of(node, method is None)):
            yield node.lineno


def opens_file(called):
    """The builtin, or a path's method; not a class's, as in `CalibrationStats.open`."""
    if isinstance(called, ast.Name):
        return called.id == "open"
    owner = getattr(called, "value", None)
    name = getattr(owner, "id", getattr(owner, "attr", ""))
    other = name[:1].isupper() or name == "os"
    return isinstance(called, ast.Attribute) and called.attr == "open" and not other


def mode_of(node, builtin):
    named = [k.value for k in node.keywords if k.arg == "mode"]
    given = [*named, *node.args[1 if builtin else 0 :]]
    return given[0].value if given and isinstance(given[0], ast.Constant) else "r"


def test_the_search_finds_what_it_should():
    code = (
        "p.read_text()\np.write_text(x)\nopen(p)\np.open('w', newline='')\n"
        "p.read_text(encoding='utf-8')\nopen(p, 'rb')\np.open('wb')\nImage.open(p)\nos.open(p, 1)\n"
    )
    assert list(text_calls(ast.parse(code))) == [1, 2, 3, 4]


@pytest.mark.parametrize("room", ROOMS)
def test_every_text_file_is_opened_in_utf_8(room):
    files = [file for file in SOURCES if file.is_relative_to(ROOT / room)]
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in text_calls(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not found

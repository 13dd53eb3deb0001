"""Every property that docs/methods_details.md lists is tested, where it says: read from the marks, without imports."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PROPERTIES = [f"P{number}" for number in range(1, 26)]
ROW = re.compile(r"^\| (P\d+) \|.*\| ([^|]*) \|$", re.MULTILINE)


def marks_in(source):
    """(function, property) for every mark `pytest.mark.parity("P1", ...)` on a test function."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or not function.name.startswith("test_"):
            continue
        for mark in function.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.parity":
                yield from ((function.name, ast.literal_eval(number)) for number in mark.args)


def marked_files():
    """Property -> names of the files that test it, without `test_` and `.py`."""
    files = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for _, number in marks_in(path.read_text()):
            files.setdefault(number, set()).add(path.stem.removeprefix("test_"))
    return files


def test_every_property_has_a_test():
    found = marked_files()
    assert [number for number in PROPERTIES if number not in found] == []
    assert sorted(set(found) - set(PROPERTIES)) == []


def test_the_documentation_names_the_files():
    rows = ROW.findall((TESTS.parent / "docs" / "methods_details.md").read_text())
    assert [number for number, _ in rows] == PROPERTIES
    found = marked_files()
    for number, cell in rows:
        assert set(cell.replace("`", "").split(", ")) == found[number], number


def test_this_test_sees_marks():
    source = '@pytest.mark.parity("P3", "P4")\n@other\ndef test_a(): ...\n\ndef test_b(): ...\n'
    assert list(marks_in(source)) == [("test_a", "P3"), ("test_a", "P4")]
    assert list(marks_in(source.replace("test_a", "helper"))) == []

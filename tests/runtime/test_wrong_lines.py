"""A corpus of wrong command lines: each is answered by one sentence that names what was wrong, and by its exit code."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from ditq_runtime.cli import app

CORPUS = Path(__file__).with_name("wrong_lines.txt")
LINES = [
    [part.strip() for part in line.split(" | ")]
    for line in CORPUS.read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


COMPILES = (
    "bench census",
    "bench host",
    "bench launches",
    "tune",
)  # which need Triton, that a CPU's user may lack


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the corpus calls {missing}, {empty}, {text}, ..."""
    root = tmp_path_factory.mktemp("wrong")
    for name in ("folder", "full", "float", "badconfig", "nojson"):
        (root / name).mkdir()
    (root / "empty").write_bytes(b"")
    (root / "text").write_text("no model", encoding="utf-8")
    (root / "full" / "something").write_text("keep me", encoding="utf-8")
    floats = {"_class_name": "DiTTransformer2DModel", "num_layers": 1, "sample_size": 8}
    (root / "float" / "config.json").write_text(json.dumps(floats), encoding="utf-8")
    packed = floats | {"quantization_config": {"quant_method": "ditq", "scheme": "w8"}}
    (root / "badconfig" / "config.json").write_text(json.dumps(packed), encoding="utf-8")
    (root / "nojson" / "config.json").write_text("{", encoding="utf-8")
    return root


def test_there_are_a_hundred_and_fifty():
    assert len(LINES) >= 150
    assert len({line for _, line, _ in LINES}) == len(LINES)


@pytest.mark.parametrize(
    ("code", "line", "named"), LINES, ids=[f"{i}: {line[1]}" for i, line in enumerate(LINES)]
)
def test_a_wrong_line_is_answered_by_a_sentence(
    places, tmp_path, monkeypatch, capfd, code, line, named
):
    monkeypatch.chdir(tmp_path)
    lacking = line.startswith(COMPILES) and find_spec("triton") is None

    def placed(text):
        return re.sub(r"\{(\w+)\}", lambda found: str(places / found[1]), text)

    ended = app.run([placed(word) for word in line.split()])
    out, err = capfd.readouterr()
    answer = err.strip()
    if lacking and "pip install triton" in answer:
        code, named = "1", "triton"
    assert ended == int(code), answer
    assert "Traceback" not in answer
    assert "unexpected" not in answer
    assert placed(named) in answer + (out if line == "bench" else "")
    if line != "bench":
        assert out == ""
        assert len(answer.splitlines()) <= 2, answer
        assert answer.startswith("ditq: ")
        assert answer.count("ditq: ") == 1
    assert not any(tmp_path.iterdir()), "a refused command left something"

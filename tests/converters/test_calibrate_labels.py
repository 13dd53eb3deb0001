"""Class labels: drawn from those that mean something, or read from a file and refused with a line number."""

import pytest

from ditq_runtime.calls.inputs import gather
from ditq_runtime.calls.labels import draw, read_labels
from ditq_runtime.calls.pipeline import pipeline_of


@pytest.fixture
def file(tmp_path):
    return tmp_path / "labels.txt"


def test_a_bare_transformer_draws_from_all_classes(make_dit):
    pipe = pipeline_of(make_dit())
    given = gather("test", pipe, samples=40)
    labels = [label for one in given for label in one.arguments["class_labels"]]
    assert [len(one.arguments["class_labels"]) for one in given] == [8] * 5
    assert len(set(labels)) == 40
    assert 500 < max(labels) < 1000  # never the null class
    seeds = [seed for one in given for seed in one.seeds]
    assert len(set(seeds)) == 40  # and noise of its own for each
    alone = gather("test", pipe, samples=40, batch=1)
    assert [one.seeds[0] for one in alone] == seeds  # however they are put into calls


def test_labels_are_drawn_without_replacement_and_by_seed():
    ids = [4, 8, 15, 16, 23]
    drawn = draw(ids, 12, seed=1)
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == ids
    assert drawn == draw(ids, 12, seed=1)
    assert drawn[:7] == draw(ids, 7, seed=1)
    assert any(drawn != draw(ids, 12, seed=seed) for seed in (2, 3))


def test_ids_and_names_one_per_line(make_pipeline, file):
    pipe = make_pipeline()
    file.write_text("7\n goldfish \nTinca tinca\r\n0\n7", encoding="utf-8")
    assert read_labels(file, pipe) == (7, 1, 0, 0, 7)
    (given,) = gather("test", pipe, file)  # as inputs
    assert given.arguments["class_labels"] == [7, 1, 0, 0, 7]


def test_a_bare_transformer_has_ids_only(make_dit, file):
    pipe = pipeline_of(make_dit())
    file.write_text("0\n999\n")
    assert read_labels(file, pipe) == (0, 999)
    file.write_text("0\n1000\n")  # the null class
    with pytest.raises(ValueError, match=r"line 2: unknown class '1000'; its class ids are 0 to 9"):
        read_labels(file, pipe)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"\n", "line 1: is empty"),
        (b"0\n\n1\n", "line 2: is empty"),
        (b"0\n1\n   \n", "line 3: is empty"),
        (b"0\nwhale\n", r"line 2: unknown class 'whale'; .*its names Tinca tinca, tench, goldfish"),
        (b"0\n2\n", "line 2: unknown class '2'"),  # has no name, so means nothing
        (b"-1\n", "line 1: unknown class '-1'"),
        ("²\n".encode(), "line 1: unknown class"),
        (b"1.0\n", "line 1: unknown class"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_bad_files_are_refused_with_a_line_number(make_pipeline, file, data, sentence):
    pipe = make_pipeline()
    file.write_bytes(data)
    with pytest.raises(ValueError, match=sentence):
        read_labels(file, pipe)


def test_a_missing_file_is_named(make_pipeline, file):
    pipe = make_pipeline()
    with pytest.raises(FileNotFoundError, match=r"labels\.txt"):
        read_labels(file, pipe)

"""Output appears whole or not at all, also when the process is killed in the middle."""

import importlib.util
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ditq_runtime import files
from ditq_runtime.files import (
    atomic_file,
    atomic_folder,
    check_file,
    check_new,
    one_writer,
    remove_leftovers,
    write_json,
)


@pytest.fixture
def umask():
    """The umask of most machines, whatever this one's is."""
    before = os.umask(0o022)
    yield 0o022
    os.umask(before)


def _mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_appears_when_the_block_ends(tmp_path, umask):
    target = tmp_path / "deep" / "x.bin"
    with atomic_file(target) as part:
        part.write_bytes(b"new")
        assert part.parent.parent == target.parent  # one file system, so that a rename is atomic
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert [path.name for path in target.parent.iterdir()] == ["x.bin"]
    assert _mode(target) == 0o644


def _half_written(atomic, target, stop, meanwhile=lambda: None):
    """Write something, let something happen, then stop."""
    with atomic(target) as part:
        (part / "a" if part.is_dir() else part).write_bytes(b"ne")
        meanwhile()
        if stop is not None:
            raise stop


@pytest.mark.parametrize("stop", [RuntimeError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_a_block_that_does_not_end_leaves_nothing(tmp_path, atomic, stop):
    with pytest.raises(type(stop)):
        _half_written(atomic, tmp_path / "deep" / "x", stop)
    assert not [path for path in tmp_path.rglob("*") if path.name != "deep"]


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    target = tmp_path / "x.bin"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk"):
        _half_written(atomic_file, target, RuntimeError("disk full"))
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_a_folder_appears_when_the_block_ends(tmp_path, umask):
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (_mode(target), _mode(target / "sub"), _mode(target / "sub" / "a")) == (
        0o755,
        0o755,
        0o644,
    )


def test_a_packed_folder_can_be_read_by_others(packed_folder):
    # safetensors writes its files for their owner only
    for path in packed_folder("w8_token").rglob("*"):
        assert _mode(path) & 0o444 == 0o444, path


def test_an_empty_folder_may_be_the_target(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with atomic_folder(target) as part:
        (part / "a").write_text("1")
    assert (target / "a").read_text() == "1"


def test_a_target_in_use_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("precious")
    for target in (tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(FileExistsError, match=f"{target.name} already exists; choose another"):
            check_new(target)
        with pytest.raises(FileExistsError, match="already exists"), atomic_folder(target):
            pytest.fail("the block ran")
    assert (tmp_path / "file").read_text() == "precious"
    assert (tmp_path / "folder" / "mine").read_text() == "precious"
    assert len([*tmp_path.iterdir()]) == 2
    check_new(tmp_path / "new")


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "out"

    def another_process():
        target.mkdir()
        (target / "mine").write_text("precious")

    with pytest.raises(OSError, match="out"):
        _half_written(atomic_folder, target, None, another_process)
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_run_are_removed_and_others_are_not(tmp_path):
    (tmp_path / ".out.abcd1234.part").mkdir()
    (tmp_path / ".out.abcd1234.part" / "a").write_text("1")
    (tmp_path / ".other.abcd1234.part").mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.abcd1234.part", "out"]


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_a_killed_process_leaves_no_target(tmp_path, kind):
    # the module alone: it needs only the standard library, so the child starts at once
    # and a writer may have a temporary file of its own beside what it was told to write, as safetensors has
    code = (
        "import importlib.util, os, pathlib, signal, sys\n"
        "spec = importlib.util.spec_from_file_location('files', sys.argv[1])\n"
        "files = importlib.util.module_from_spec(spec); spec.loader.exec_module(files)\n"
        f"with files.{kind}(pathlib.Path(sys.argv[2])) as part:\n"
        "    (part / 'a' if part.is_dir() else part).write_text('half')\n"
        "    (part if part.is_dir() else part.parent).joinpath('.tmpWriter').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, files.__file__, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    assert all(path.name.startswith(".out.") for path in tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert all(path.suffix == ".lock" for path in tmp_path.iterdir())  # which nobody holds

    with getattr(files, kind)(target) as part:
        (part / "a" if part.is_dir() else part).write_text("whole")
    assert (target / "a" if kind == "atomic_folder" else target).read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_module_needs_only_the_standard_library():
    spec = importlib.util.spec_from_file_location("alone", files.__file__)
    assert spec is not None
    code = f"import sys; exec(open({files.__file__!r}).read()); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_is_sorted_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "x.json", {"b": [1], "a": "é"})
    text = (tmp_path / "x.json").read_text()
    assert text == '{\n  "a": "\\u00e9",\n  "b": [\n    1\n  ]\n}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", object())
    assert (tmp_path / "x.json").read_text() == text


def test_one_target_has_one_writer_at_a_time(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as part:
        (part / "a").write_text("first")
        with (
            pytest.raises(ValueError, match="another process is writing it; wait for that one"),
            atomic_folder(target) as other,
        ):
            (other / "a").write_text("second")
        with atomic_folder(tmp_path / "other") as other:  # its neighbour is free
            (other / "b").write_text("x")
    assert (target / "a").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_who_works_on_a_target_for_long_enters_once_more(tmp_path):
    target, seen = tmp_path / "new" / "out", []

    def another():
        with pytest.raises(ValueError, match="another process is writing it"), one_writer(target):
            pass
        seen.append("refused")

    with one_writer(target, again=True):
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
        with one_writer(target, again=True), atomic_folder(target) as part:
            (part / "a").write_text("whole")
            with pytest.raises(ValueError, match="is writing it"), atomic_folder(target):
                pass
    assert seen == ["refused"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    with one_writer(tmp_path / "other" / "out"):
        pass  # nothing came into the folder that was made for it
    assert not (tmp_path / "other").exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    (tmp_path / ".out.lock").write_text("")
    with atomic_folder(tmp_path / "out") as part:
        (part / "a").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "out"

    def appear():
        target.mkdir()
        (target / "a").write_text("theirs")

    with pytest.raises(FileExistsError, match="already exists"):
        _half_written(atomic_folder, target, None, appear)
    assert (target / "a").read_text() == "theirs"


def test_a_lock_that_its_holder_removes_is_taken_again(tmp_path):
    for _ in range(3):
        with one_writer(tmp_path / "out"):
            assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    assert not list(tmp_path.iterdir())


def test_places_where_nothing_can_appear_are_known_before_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path, sentence in {
        tmp_path / "link": "is a symbolic link",
        tmp_path / "here": "is the current folder",
        Path("."): "is the current folder",
        Path(".."): "or one above it",
        tmp_path / "file" / "out": "is a file; choose another place",
        tmp_path / "file" / "deep" / "out": "is a file; choose another place",
        Path("/proc"): "is a mount point",
        Path("/proc/out"): "nothing can be written in /proc",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            check_new(path)
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        check_file(tmp_path / "real")
    with pytest.raises(ValueError, match=r"must end in \.png"):
        check_file(tmp_path / "x.jpg", (".png",))
    with pytest.raises(ValueError, match="is a file; choose"):
        check_file(tmp_path / "file" / "x.png", (".png",))
    check_new(tmp_path / "real")  # empty
    check_new(tmp_path / "a" / "b")
    check_file(tmp_path / "x.PNG", (".png",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "here", "link", "real"]

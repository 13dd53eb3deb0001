"""Every error that a command ends with, as one sentence: what was expected, what came, what to do."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable
from typing import Any

EXPECTED = (ValueError, OSError, RuntimeError, NotImplementedError, ImportError)
OPTIONS = re.compile(r"No such option: (\S+) \(Possible options?: ([^)]+)\)")
EXTRA = re.compile(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)")
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors says what the system said
FULL = "the disk is full; free some space and run the same command again"
PREFIXES = ("Invalid value: ", "ditq: ")  # what typer and we put before a text that has its own


def sentence(error: Exception) -> str:
    """What a failed command says; a failure that nobody foresaw names its type and asks for a report."""
    told = next((say(error) for kind, say in KINDS if _is(error, kind)), None)
    if told is not None:
        return told
    text = _one_line(str(error))
    if isinstance(error, EXPECTED) and text:
        return text
    return f"unexpected {type(error).__name__}: {text}; run again with --debug and report the traceback"


def misuse(error: Any, command: str = "ditq") -> str:
    """What a wrong command line is answered with: the sentence, and where the right one is described.

    Args:
        error: of typer.
        command: that was typed, for an error that does not know it.
    """
    command = error.ctx.command_path if error.ctx else command
    text = _one_line(error.format_message())
    for prefix in (*PREFIXES, f"{command}: "):
        text = text.removeprefix(prefix)
    text = EXTRA.sub(r"too many arguments: \1", text)
    text = OPTIONS.sub(_did_you_mean, text)
    stop = "" if text.endswith((".", "?")) else "."
    return f"{text}{stop} See `{command} --help`."


def _did_you_mean(found: re.Match[str]) -> str:
    """An unknown option with those that are alike but for their dashes; typer also finds dashes alike."""
    asked = str(found[1])
    known = {other.strip("-"): other for other in str(found[2]).split(", ")}
    alike = difflib.get_close_matches(asked.strip("-"), known, cutoff=0.7)
    return f"No such option: {asked}" + (
        f". Did you mean {' or '.join(known[name] for name in alike)}?" if alike else ""
    )


def _module(error: Any) -> str:
    if not error.name:
        return _one_line(str(error))
    package = error.name.partition(".")[0]
    return f"this needs the package {package}, which is not installed; `pip install {package}`"


def _is(error: Exception, kind: str | int) -> bool:
    if isinstance(kind, int):
        told = kind == errno.ENOSPC or getattr(error, "filename", None) is not None
        return isinstance(error, OSError) and error.errno == kind and told
    return any(kind == base.__name__ for base in type(error).__mro__)


def _file(what: str) -> Callable[[Any], str]:
    return lambda error: f"{error.filename}: {what}"


def _safetensors(error: Exception) -> str:
    told = OS_ERROR.search(str(error))
    if told and int(told[1]) == errno.ENOSPC:
        return FULL
    return f"not a readable safetensors file ({_one_line(str(error))}); check the path, or make it again"


def _memory(error: Exception) -> str:
    return f"out of memory ({_one_line(str(error)) or 'allocation failed'}); take a smaller batch or --memory-budget"


# a class by its name, so that nothing is imported for it, or an errno of an OSError that names a file
KINDS: tuple[tuple[str | int, Callable[[Any], str]], ...] = (
    (errno.ENOENT, _file("no such file or folder; check the path")),
    (errno.ENOSPC, lambda error: f"{error.filename}: {FULL}" if error.filename else FULL),
    (errno.EACCES, _file("permission denied; choose a place that you may read and write")),
    (errno.EROFS, _file("the file system is read-only; choose another place")),
    (errno.EISDIR, _file("is a folder where a file was expected")),
    (errno.ENOTDIR, _file("part of this path is a file; choose another place")),
    ("SafetensorError", _safetensors),
    ("ModuleNotFoundError", _module),
    ("OutOfMemoryError", _memory),
    ("MemoryError", _memory),
)


def _one_line(text: str) -> str:
    return " ".join(text.split())

"""Writes docs/reference/ from the code: the command line from its help texts, Python from docstrings.

    python docs/write_reference.py

A test compares what is there with what this would write.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from ditq_runtime.cli.app import make_app

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Written from the code by `python docs/write_reference.py`; edit the code. -->"
PACKAGES = {
    "ditq_runtime": "Plays checkpoints. `import ditq_runtime as ditq`.",
    "ditq_converters": "Makes checkpoints.",
    "ditq_kernels": "Arithmetic on tensors. `import ditq_kernels as k`.",
}


def pages() -> dict[str, str]:
    """File name in docs/reference -> its text."""
    return {"cli.md": command_line(), "python.md": python()}


def command_line() -> str:
    """Every command with its arguments and options."""
    root: Any = typer.main.get_command(make_app())
    parts = ["# Command line", NOTE, "`--debug` anywhere shows tracebacks. Exit codes: 0 done, 1 failed, 2 misuse, "
             "130 interrupted."]  # fmt: skip
    context = root.context_class(
        root, info_name="ditq", terminal_width=10**6, max_content_width=10**6
    )
    for name, command, inner in _commands(root, context, "ditq"):
        parts.append(f"## {name}")
        parts.append(inspect.cleandoc(command.help or ""))
        records = [p.get_help_record(inner) for p in command.get_params(inner) if p.name != "help"]
        rows = [f"| `{_cell(left)}` | {_cell(right)} |" for left, right in filter(None, records)]
        parts.append("\n".join(["| | |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _commands(group: Any, context: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = command.context_class(command, info_name=name, parent=context)
        if hasattr(command, "list_commands"):
            yield from _commands(command, inner, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command, inner


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def python() -> str:
    """Every exported name with its signature and docstring."""
    parts = ["# Python", NOTE]
    for package, what in PACKAGES.items():
        module = importlib.import_module(package)
        parts += [f"## {package}", what]
        for name in sorted((n for n in module.__all__ if n[0] != "_"), key=str.lower):
            parts += [f"### {package}.{name}", _entry(name, getattr(module, name))]
    return "\n\n".join(parts) + "\n"


def _entry(name: str, value: Any) -> str:
    if not callable(value):
        return f"`{value!r}`"
    text = f"{name}{_signature(value)}\n\n{inspect.getdoc(value) or ''}"
    if inspect.isclass(value):
        text += "".join(_method(member, found) for member, found in vars(value).items())
    return f"```text\n{text.strip()}\n```"


def _method(name: str, member: Any) -> str:
    """A public method or property of a class, in one line."""
    inner = getattr(member, "fget", None) or getattr(member, "__func__", member)
    if name.startswith("_") or not inspect.isfunction(inner) or not inner.__doc__:
        return ""
    call = "" if isinstance(member, property) else _signature(inner)
    return f"\n\n.{name}{call}\n    {inner.__doc__.strip().splitlines()[0]}"


def _signature(value: Any) -> str:
    """Parameters without `self`, annotations as they are written."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    parts, keywords = [], False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            parts.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        keywords = keywords or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        parts.append(f"{stars}{parameter.name}{_typed(parameter)}")
    returns = found.return_annotation
    arrow = "" if returns is found.empty or inspect.isclass(value) else f" -> {_written(returns)}"
    return f"({', '.join(parts)}){arrow}"


def _typed(parameter: inspect.Parameter) -> str:
    """`: annotation = default`, as far as there are any."""
    annotation = (
        "" if parameter.annotation is parameter.empty else f": {_written(parameter.annotation)}"
    )
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return annotation + default


def _written(annotation: Any) -> str:
    return (
        annotation
        if isinstance(annotation, str)
        else getattr(annotation, "__name__", str(annotation))
    )


if __name__ == "__main__":
    for file, page in pages().items():
        (FOLDER / file).write_text(page, encoding="utf-8")

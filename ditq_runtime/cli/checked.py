"""What every command checks of its options first: numbers are finite, output places can be written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from ditq_runtime.files import check_file, check_place

SIZE = re.compile(r"(?=.*[1-9])\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)  # as diffusers reads it


def _finite(option: str, value: float) -> None:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{option} must be a finite number, got {value}.")


def _size(option: str, value: str) -> None:
    if not SIZE.fullmatch(value.strip()):
        raise typer.BadParameter(f"{option} must be a size such as 500MB or 10GB, got {value!r}.")


def _place(option: str, value: Any) -> None:
    check_place(Path(value))


def _file(option: str, value: Any) -> None:
    check_file(Path(value))


def _folder(option: str, value: Any) -> None:
    if Path(value).is_file():
        raise ValueError(f"{option}: {value} is a file; name a folder")
    check_place(Path(value))


def _there(option: str, value: Any) -> None:
    if not Path(value).is_file():
        raise typer.BadParameter(f"{option}: no file at {value}; check the path.")


# name of a parameter -> its check; floats have theirs whatever they are called
CHECKS: dict[str, Callable[[str, Any], None]] = {
    "max_shard_size": _size,
    "out": _place,
    "csv": _file,
    "npz": _file,
    "inputs": _there,
    "labels": _there,
    "prompts": _there,
    "results": _folder,
}
# name of a command -> what its `out` is, where the command itself does not look
OUTS: dict[str, Callable[[str, Any], None]] = dict.fromkeys(
    ("plan", "host", "launches", "census"), _file
) | dict.fromkeys(
    ("kernels", "model", "methods", "flow", "profiles", "papers", "jitter", "auto", "full-size"),
    _folder,
)


class Checked(TyperCommand):
    """A command that looks at its options first."""

    def invoke(self, ctx: Any) -> Any:
        """Check, then run.

        Raises:
            BadParameter: a value that no command could use.
            ValueError: a place that nothing can be written to.
        """
        checks = CHECKS | ({"out": OUTS[str(self.name)]} if self.name in OUTS else {})
        try:
            for param in self.params:
                value = ctx.params.get(param.name)
                option = param.opts[0] if param.opts else str(param.name)
                if value is None or value == "":
                    continue
                if isinstance(value, float):
                    _finite(option, value)
                if param.name in checks:
                    checks[param.name](option, value)
        except typer.BadParameter as error:
            error.ctx = ctx  # the answer names the command
            raise
        return super().invoke(ctx)

"""Lists that a command line gives as comma-separated names."""

from __future__ import annotations

import typer


def chosen_of(option: str, given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Comma-separated names, all of them known; none given: all."""
    names = tuple(name.strip() for name in given.split(",")) if given else known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"{option}: unknown {unknown}; choose from {', '.join(known)}.")
    return names

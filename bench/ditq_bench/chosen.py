"""Lists that a command line gives as comma-separated names."""

from __future__ import annotations

import typer


def chosen_of(option: str, given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Comma-separated names, all of them known; none given: all."""
    names = tuple(name.strip() for name in given.split(",") if name.strip()) if given else known
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        told = f"unknown {', '.join(unknown)}" if unknown else f"names nothing, got {given!r}"
        raise typer.BadParameter(f"{option}: {told}; choose from {', '.join(known)}.")
    return names

"""`python -m ditq_bench.zoo [NAME ...]`: build and check every entry, print two tables; 1 if one breaks a promise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import typer

from ditq_bench.zoo import CLASSES, PIPELINES, Pipe, Tiny
from ditq_bench.zoo.check import pipe_problems, problems, same_bits
from ditq_bench.zoo.pipelines import MAIN

ROW = "{:<40} {:>10} {:>6}  {:<34} {}"


def row(tiny: Tiny) -> tuple[str, list[str]]:
    """(line of the table of classes, what is wrong with the entry)."""
    began = time.process_time()
    model = tiny.build()
    inputs = tiny.inputs(model)
    found = problems(tiny, model, inputs)
    if not same_bits(tiny, model, inputs):
        found.append("equal seeds give different bits")
    seconds = f"{time.process_time() - began:.1f}"
    parameters = f"{sum(p.numel() for p in model.parameters()):,}"
    times = tiny.timestep if isinstance(tiny.timestep, str) else ", ".join(tiny.timestep or ("-",))
    return ROW.format(tiny.name, parameters, seconds, times, MAIN.get(tiny.name, "")), found


def pipe_row(name: str, pipe: Pipe) -> tuple[str, list[str]]:
    """(line of the table of pipelines, what is wrong with the entry)."""
    began = time.process_time()
    found = pipe_problems(pipe)
    seconds = f"{time.process_time() - began:.1f}"
    return ROW.format(name, "", seconds, ", ".join(pipe.transformers), ""), found


def main(names: list[str]) -> int:
    """Print a line for each entry whose name holds one of `names` (of all if there are none); returns the exit code."""
    entries: list[tuple[str, Callable[[], tuple[str, list[str]]]]] = []
    entries += [(name, lambda tiny=tiny: row(tiny)) for name, tiny in CLASSES.items()]  # type: ignore[misc]
    entries += [(f"{n} pipeline", lambda n=n, p=p: pipe_row(n, p)) for n, p in PIPELINES.items()]  # type: ignore[misc]
    chosen = [make for name, make in entries if not names or any(part in name for part in names)]
    typer.echo(
        ROW.format(
            "class or pipeline", "parameters", "CPU s", "timestep or transformers", "pipeline"
        )
    )
    broken = 0
    for make in chosen:
        line, found = make()
        typer.echo("\n    ".join([line, *found]))
        broken += bool(found)
    typer.echo(f"{len(chosen)} entries, {broken} broken")
    return 1 if broken or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

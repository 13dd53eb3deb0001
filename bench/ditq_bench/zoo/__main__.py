"""`python -m ditq_bench.zoo [NAME ...]`: build and check every entry, print a table; 1 if one breaks a promise."""

from __future__ import annotations

import sys
import time

import typer

from ditq_bench.zoo import CLASSES, Tiny
from ditq_bench.zoo.check import problems, same_bits

ROW = "{:<40} {:>10} {:>7}  {:<34} {}"


def row(tiny: Tiny) -> tuple[str, list[str]]:
    """(line of the table, what is wrong with the entry)."""
    began = time.process_time()
    model = tiny.build()
    inputs = tiny.inputs(model)
    found = problems(tiny, model, inputs)
    if not same_bits(tiny, model, inputs):
        found.append("equal seeds give different bits")
    seconds = f"{time.process_time() - began:.1f}"
    parameters = f"{sum(p.numel() for p in model.parameters()):,}"
    times = tiny.timestep if isinstance(tiny.timestep, str) else ", ".join(tiny.timestep or ("-",))
    pipeline = "pipeline" if tiny.pipeline else ""
    return ROW.format(tiny.name, parameters, seconds, times, pipeline), found


def main(names: list[str]) -> int:
    """Print a line for each entry whose name holds one of `names` (of all if there are none); returns the exit code."""
    typer.echo(ROW.format("class", "parameters", "CPU s", "timestep", ""))
    chosen = [name for name in CLASSES if not names or any(part in name for part in names)]
    broken = 0
    for name in chosen:
        line, found = row(CLASSES[name])
        typer.echo("\n    ".join([line, *found]))
        broken += bool(found)
    typer.echo(f"{len(chosen)} classes, {broken} broken")
    return 1 if broken or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Every launch of every op through Triton's own launcher, over a driver that does nothing.

    python -m ditq_bench.census.launched 90

What the compiler makes of a kernel says nothing of its arguments: here Triton binds them, specializes, compiles, asks
for as much shared memory as the architecture has, and launches. Ops are called as layers call them, with few options
and with many, at shapes that meet every row of the architecture's launch tables. It changes the process: one a target.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ditq_bench.census.options import options
from ditq_bench.host.cases import ODD, Shape, calls
from ditq_kernels.launch import tuning

GEMMS, ROWS = ("gemm", "lora", "w4_expand"), ("quantize_per", "quantize_static", "gelu", "adaln")
ATTENTION = ("attention", "quantize_heads")
# shapes, and how the names of ops begin that are called at them
SHAPES: tuple[tuple[Shape, tuple[str, ...]], ...] = (
    (ODD, ("",)),
    *((Shape(2, t, 1152, 16, 72), GEMMS) for t in (16, 32, 256, 512, 1024, 2048, 8192)),
    (Shape(2, 512, 4608, 16, 72), GEMMS),  # whose programs share tiles
    (Shape(64, 64, 1152, 16, 72), ("linear",)),  # a row an image
    *((Shape(2, t, k, 1, 72), ROWS) for t in (256, 8192) for k in (128, 1152, 3072, 4608, 15360)),
    *((Shape(2, 2 * keys, 64, 16, d), ATTENTION) for keys in (256, 1024) for d in (64, 72, 128)),
)
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # of a grid, by axis
Row = tuple[str, tuple[tuple[str, Any], ...]]  # of a launch table: op, and what is in it


class Launches:
    """What reaches the driver and the tables, from when it is made.

    Attributes:
        count: launches.
        grids: that no GPU would take.
        rows: of launch tables that were met.
    """

    def __init__(self) -> None:
        """Nothing yet; a stub is installed."""
        from ditq_kernels._triton.offline import stub

        self.count, self.grids, self.rows = 0, set[tuple[int, ...]](), set[Row]()
        utils, fitting = stub.utilities(), tuning._fitting_row
        launch = utils.launch

        def noted(*arguments: Any) -> Any:
            self.count += 1
            if not all(0 < n <= most for n, most in zip(arguments, MOST_PROGRAMS, strict=False)):
                self.grids.add(arguments[:3])
            return launch(*arguments)

        def row(op: str, *shape: Any) -> dict[str, Any]:
            found = fitting(op, *shape)
            self.rows.add((op, tuple(found.items())))
            return found

        utils.launch = noted
        tuning._fitting_row = row  # type: ignore[assignment]


def rows_of(target: int) -> Iterator[Row]:
    """All rows of an architecture's launch tables; an op's are in the first that has it."""
    seen: set[str] = set()
    for table in tuning.tables_of_architecture(f"sm_{target}"):
        found = {op: rows for op, rows in tuning.load_table(table)["ops"].items() if op not in seen}
        seen |= set(found)
        for op, rows in found.items():
            for row in rows:
                yield op, tuple((name, n) for name, n in row.items() if not name.startswith("max_"))


def faults(launches: Launches, shapes: Iterable[tuple[Shape, tuple[str, ...]]]) -> Iterator[str]:
    """Call every op at shapes, twice: for the first time, and by the plan that was kept; a sentence a failure."""
    device = torch.device("cpu")
    for shape, beginnings in shapes:
        made = calls(device, shape) | options(device, shape)
        for name, call in made.items():
            if name.startswith(beginnings):
                yield from _faults(launches, f"{name} at {shape}", call)
        del made
        gc.collect()


def _faults(launches: Launches, name: str, call: Callable[[], Any]) -> Iterator[str]:
    before = launches.count
    try:
        for _ in range(2):
            call()
    except Exception as error:  # the compiler and the launcher have errors of many classes
        yield f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return
    if launches.count < before + 2:
        yield f"{name}: {launches.count - before} launches of two calls"
    for grid in launches.grids:
        yield f"{name}: a grid of {grid}"
    launches.grids.clear()


def main() -> None:
    """Launch all; a line for each that fails. Exit code 1 if one does, or if a row of the tables was not met."""
    parser = argparse.ArgumentParser(description="launch every op without a GPU")
    parser.add_argument("target", type=int, help="compute capability without the dot, such as 90")
    target = parser.parse_args().target
    from ditq_kernels._triton.offline import stub

    stub.install(target)
    launches = Launches()
    with torch.no_grad():
        found = list(faults(launches, SHAPES))
    rows = set(rows_of(target))
    found += [f"no shape meets {op}: {dict(row)}" for op, row in sorted(rows - launches.rows)]
    print("\n".join(found), end="\n" * bool(found))  # noqa: T201
    met = f"{len(rows & launches.rows)} of {len(rows)} rows of its tables"
    print(f"sm_{target}: {launches.count} launches, {met}, {len(found)} faults")  # noqa: T201
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()

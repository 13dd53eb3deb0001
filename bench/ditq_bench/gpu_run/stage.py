"""What a timing stage of a GPU run does around its rows: a device, a rehearsal without one, a line of JSON a row."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

Rows = Callable[[torch.device, bool, float], Iterable[dict[str, Any]]]


def write_rows(what: str, rows_of: Rows, seconds: float, wrong: tuple[str, str]) -> None:
    """Read the command line of a stage, and write its rows as they come.

    Args:
        what: the stage does, for `--help`.
        rows_of: device, whether it is a rehearsal, seconds -> rows.
        seconds: of timing, where nobody says.
        wrong: the field of a row that is wrong, and how to say that some are.

    Raises:
        SystemExit: code 1, some rows are wrong.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument(
        "--rehearsal", action="store_true", help="no GPU: tiny, over a driver that does nothing"
    )
    args = parser.parse_args()
    if args.rehearsal:
        from ditq_kernels._triton.offline import stub

        stub.install(90)
    device, count = torch.device("cpu" if args.rehearsal else "cuda"), 0
    with torch.no_grad(), args.out.open("w", encoding="utf-8") as file:
        for row in rows_of(device, args.rehearsal, args.seconds):
            file.write(json.dumps(row) + "\n")
            file.flush()
            count += wrong[0] in row
    if count:
        raise SystemExit(f"{count} {wrong[1]}")

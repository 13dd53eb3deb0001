"""`ditq bench launches`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

FIELDS = (
    "ditq", "torch", "triton", "commit", "block", "way", "launches", "of ditq", "of Inductor", "others",
)  # fmt: skip
ORIGINS = 4


def launches(
    out: Annotated[
        Path | None,
        typer.Option(help="A CSV file; rows of other blocks that it holds stay."),
    ] = None,
    blocks: Annotated[str, typer.Option(help="Blocks, comma-separated; default: all.")] = "",
    ways: Annotated[
        str, typer.Option(help="float, inductor, ditq, ditq wide, comma-separated; default: all.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Kernels that a block launches as compiled for a GPU, without one: counted in the code that Inductor generates.

    Float and packed with Inductor's own backend, packed with backend="ditq", and that with rows too wide to fuse.
    Takes ten seconds of a core for each block and way.

    Example: ditq bench launches --blocks DiT --ways inductor,ditq
    """
    import torch

    from ditq_bench.chosen import chosen_of
    from ditq_bench.compiled.count import WAYS, launches_of_block
    from ditq_bench.compiled.families import BLOCKS
    from ditq_bench.results import origin_of, told
    from ditq_kernels._triton.offline import inductor
    from ditq_runtime.cli.output import print_json, print_table
    from ditq_runtime.cli.quiet import quiet_inductor
    from ditq_runtime.cli.voice import voice

    wanted = [
        (block, way)
        for block in chosen_of("--blocks", blocks, tuple(BLOCKS))
        for way in chosen_of("--ways", ways, tuple(WAYS))
    ]
    inductor.install()
    if not voice.verbose:
        quiet_inductor()
    rows: list[tuple[str, ...]] = []
    for block, way in wanted:
        rows.append(_row(block, way, launches_of_block(BLOCKS[block], WAYS[way])))
        if out is not None:
            _write(out, rows)
    if json:
        print_json({"rows": [dict(zip(FIELDS, row, strict=True)) for row in rows]})
        return
    made = told(origin_of(torch.device("cpu")))
    print_table(
        f"launches of a block, counted; {made}", FIELDS[ORIGINS:], [r[ORIGINS:] for r in rows]
    )


def _row(block: str, way: str, found: Counter[str]) -> tuple[str, ...]:
    import torch

    from ditq_bench.results import origin_of

    ours = sum(count for name, count in found.items() if name.startswith("ditq."))
    counts = (found.total(), ours, found["triton"], found.total() - ours - found["triton"])
    return (*origin_of(torch.device("cpu"))[1:], block, way, *map(str, counts))


def _write(path: Path, rows: list[tuple[str, ...]]) -> None:
    """These rows in the place of those of the same block and way."""
    import csv

    from ditq_runtime.files import atomic_file

    kept: dict[tuple[str, ...], tuple[str, ...]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = {_named(row): tuple(row) for row in list(csv.reader(file))[1:]}
    kept |= {_named(row): row for row in rows}
    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows(kept.values())


def _named(row: Sequence[str]) -> tuple[str, ...]:
    return tuple(row[ORIGINS : ORIGINS + 2])

"""`ditq bench host`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

FIELDS = ("call", "direct", "dispatcher", "spread, %")
STUB = "Triton's launcher over a driver that does nothing, no GPU"


def host(
    target: Annotated[
        int, typer.Option(help="Without a GPU: compute capability to launch for, such as 90.")
    ] = 90,
    out: Annotated[Path | None, typer.Option(help="Also write a CSV file.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds per call; the median counts.")] = 15,
    models: Annotated[
        bool, typer.Option(help="Blocks and steps of DiT-XL/2 and Flux, at a tiny width, too.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a call of each op, a block and a step cost the host, in small linears of torch on the same core.

    Without a GPU, Triton's own specialization, compiler and launcher run over a driver that does nothing: what is
    measured is Python, torch and Triton, not the driver.

    Example: ditq bench host --out host.csv
    """
    import torch

    from ditq_bench.census.rows import TARGETS
    from ditq_bench.host import cases, measure
    from ditq_bench.host.models import packed, steps
    from ditq_bench.results import ORIGIN, SPREAD, device_name, origin_of, told
    from ditq_converters.progress import progress_bar
    from ditq_kernels._triton.offline import stub
    from ditq_runtime.cli.output import print_json, print_table, say

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if not on_gpu and target not in TARGETS:
        raise typer.BadParameter(f"--target must be one of {', '.join(map(str, TARGETS))}.")
    made = packed() if models else {}
    if not on_gpu:
        stub.install(target)
    calls = cases.calls(device) | steps(made, device)
    with progress_bar("host", len(calls)) as advance:
        found = measure.host_costs(device, calls, advance, rounds)
    through = device_name(device) if on_gpu else f"{STUB}, sm_{target}"
    origin = origin_of(device)
    rows = [
        (c.call, f"{c.direct:.2f}", f"{c.dispatcher:.2f}", f"{100 * c.spread:.0f}") for c in found
    ]
    if out is not None:
        _write(out, origin, through, rows)
    if json:
        named = [dict(zip(FIELDS, row, strict=True)) for row in rows]
        made = dict(zip(ORIGIN, origin, strict=True))
        unit = "one F.linear of [2, 16] on a CPU"
        print_json({**made, "through": through, "unit": unit, "rows": named})
        return
    print_table(f"{told(origin)}; host cost in small linears; {through}", FIELDS, rows)
    busy = [cost.call for cost in found if cost.spread > SPREAD]
    if busy:
        say(
            f"rounds of {len(busy)} calls differ by more than {100 * SPREAD:.0f} %: the machine is busy"
        )


def _write(
    path: Path, origin: tuple[str, ...], through: str, rows: Sequence[tuple[str, ...]]
) -> None:
    import csv

    from ditq_bench.results import FIELDS as LABELS
    from ditq_runtime.files import atomic_file

    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((*LABELS[: len(origin)], "through", *FIELDS))
        writer.writerows((*origin, through, *row) for row in rows)

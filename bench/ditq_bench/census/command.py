"""`ditq bench census`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ditq_bench.chosen import chosen_of

COLUMNS = (
    "kernel", "target", "tokens", "launch", "registers", "spills", "instructions", "products",
    "others_per_product", "issue_share", "limiter", "programs_per_sm",
)  # fmt: skip
DROPPABLE = ("programs_per_sm", "others_per_product", "limiter", "issue_share", "products")


def census(
    kernel: Annotated[str, typer.Option(help="Kernels, comma-separated; default: all.")] = "",
    target: Annotated[
        str, typer.Option(help="Compute capabilities, comma-separated: 80, 86, 89, 90, 100, 120.")
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="One launch per kernel and target; exit 1 on a fault.")
    ] = False,
    update_budget: Annotated[
        bool, typer.Option("--update-budget", help="With --check: raise budgets to what is seen.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write a CSV file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the machine code of every kernel and tuned launch, compiled here without a GPU.

    Limiter, issue share and programs per SM are those of a static model, not measurements. An issue share is
    issue clocks per tensor-core clock.

    Example: ditq bench census --kernel gemm_w8a8 --target 80,90
    """
    if update_budget and not check:
        raise typer.BadParameter("--update-budget: budgets are for --check; give both.")
    from ditq_bench.census import gate, rows
    from ditq_bench.results import commit
    from ditq_converters.progress import progress_bar
    from ditq_runtime.cli.output import print_json, say
    from ditq_runtime.version import __version__

    kernels = chosen_of("--kernel", kernel, rows.kernel_names())
    targets = tuple(
        map(int, chosen_of("--target", target, _names((*rows.TARGETS, *rows.UNSERVED))))
    )
    if check and not target:
        found = rows.gated_cases(kernels, _triton_version())
    else:
        found = rows.cases(kernels, targets, usual_only=check)
    with progress_bar("census", len(found)) as advance:
        taken, refused = rows.census_rows(found, advance)
    if out is not None:
        rows.write_csv(out, taken)
    if update_budget:
        gate.update_budget(taken, _triton_version())
    budget = gate.load_budget()["instructions"]
    wrong = [fault for row in taken for fault in gate.faults(row, budget)] if check else []
    wrong += refused
    if json:
        report: dict[str, Any] = {
            "ditq": __version__,
            "commit": commit(),
            "triton": _triton_version(),
        }
        report |= {"rows": [row.fields() for row in taken], "faults": wrong}
        print_json(report)
    else:
        table = [[_cell(row.fields()[name]) for name in COLUMNS] for row in taken]
        made = f"Triton {_triton_version()}, ditq {__version__} ({commit()})"
        _print(f"{made}; compiled, not run", table)
        for fault in wrong:
            say(fault)
        if check:
            say(f"{len(found)} kernels checked on {_architectures(found)}, {len(wrong)} faults")
    if wrong and check:
        raise typer.Exit(1)


def _print(title: str, table: list[list[Any]]) -> None:
    """A table for every kernel and target, so that they fit a terminal; one for all as CSV."""
    from ditq_runtime.cli.output import print_table, say
    from ditq_runtime.cli.voice import voice

    if voice.csv:
        print_table(title, COLUMNS, table)
        return
    say(title)
    for kernel, target in dict.fromkeys((row[0], row[1]) for row in table):
        rows = [row[2:] for row in table if row[:2] == [kernel, target]]
        print_table(f"\n{kernel}, sm_{target}", COLUMNS[2:], rows, DROPPABLE)


def _names(targets: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(map(str, targets))


def _architectures(found: list[tuple[str, int, Any, Any]]) -> str:
    return ", ".join(f"sm_{target}" for target in sorted({case[1] for case in found}))


def _cell(value: Any) -> Any:
    return "" if value is None else value


def _triton_version() -> str:
    from importlib.metadata import version

    return version("triton")

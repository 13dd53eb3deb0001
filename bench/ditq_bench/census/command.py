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
    known: Annotated[
        Path | None,
        typer.Option(
            help="With --check: a table of counts; launches from the same sources are not compiled, but for a sample."
        ),
    ] = None,
    update_known: Annotated[
        bool, typer.Option("--update-known", help="With --known: write what is compiled into it.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write a CSV file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the machine code of every kernel and tuned launch, compiled here without a GPU.

    Limiter, issue share and programs per SM are those of a static model, not measurements. An issue share is
    issue clocks per tensor-core clock.

    Example: ditq bench census --kernel gemm_w8a8 --target 80,90
    """
    if (update_budget or known is not None) and not check:
        raise typer.BadParameter(
            "--update-budget and --known: budgets and known counts are for --check; give both."
        )
    if update_known and known is None:
        raise typer.BadParameter("--update-known: which table? Give --known too.")
    from ditq_bench.census import gate, rows
    from ditq_bench.census.taken import faults, take, triton_version, write_known
    from ditq_runtime.cli.output import say

    kernels = chosen_of("--kernel", kernel, rows.kernel_names())
    targets = tuple(
        map(int, chosen_of("--target", target, _names((*rows.TARGETS, *rows.UNSERVED))))
    )
    if check and not target:
        found = rows.gated_cases(kernels, triton_version())
    else:
        found = rows.cases(kernels, targets, usual_only=check)
    taken = take(found, known)
    if out is not None:
        rows.write_csv(out, [row for _, row in taken.compiled])
    if update_budget:
        gate.update_budget(taken.rows, triton_version())
    if update_known and known is not None:
        write_known(taken, known)
    wrong = faults(taken, known) if check else taken.refused
    _tell(taken, wrong, json)
    if check and not json:
        say(f"{len(found)} kernels checked on {_architectures(found)}, {len(wrong)} faults")
    if wrong and check:
        raise typer.Exit(1)


def _tell(taken: Any, wrong: list[str], json: bool) -> None:
    """Rows, and sentences about what is wrong with them."""
    from ditq_bench.census.taken import triton_version
    from ditq_bench.results import commit
    from ditq_runtime.cli.output import print_json, say
    from ditq_runtime.version import __version__

    if json:
        report: dict[str, Any] = {
            "ditq": __version__,
            "commit": commit(),
            "triton": triton_version(),
            "compiled": len(taken.compiled),
        }
        print_json(report | {"rows": [row.fields() for row in taken.rows], "faults": wrong})
        return
    table = [[_cell(row.fields()[name]) for name in COLUMNS] for row in taken.rows]
    made = f"Triton {triton_version()}, ditq {__version__} ({commit()})"
    _print(f"{made}; compiled, not run", table)
    for fault in wrong:
        say(fault)


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

"""`ditq bench`: measure on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(help="Measure kernels on this machine.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Measure kernels on this machine."""


@bench.command()
def kernels(
    shapes: Annotated[
        str, typer.Option(help="Named shapes, comma-separated.")
    ] = "digits,dit-xl-256",
    out: Annotated[Path, typer.Option(help="Folder for gemm.csv.")] = Path("runs/bench"),
    device: Annotated[str, typer.Option(help="cpu, cuda; default: cuda where there is one.")] = "",
    budget: Annotated[float, typer.Option(help="Seconds per shape.")] = 20.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Latency of the quantized linears against torch fp32, bf16 and _int_mm, in one run.

    Every quantized row is checked against fp64 first; a wrong answer gets no time. On a CPU the integer ops run on
    the exact reference backend, which is slow and says so.

    Example: ditq bench kernels --shapes dit-xl-256 --out runs/bench
    """
    import torch

    import ditq_kernels as k
    from ditq_bench.gemm import bench_gemm
    from ditq_bench.results import device_name, write_csv
    from ditq_bench.shapes import SHAPES
    from ditq_runtime.cli.output import print_json, print_table, say

    names = [name.strip() for name in shapes.split(",")]
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise typer.BadParameter(f"--shapes: unknown {unknown}; choose from {', '.join(SHAPES)}.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backend = k.backend_of("gemm_w8a8", place)
    rows = [
        (shape, row)
        for name in names
        for shape in SHAPES[name]
        for row in bench_gemm(shape, place, budget)
    ]
    write_csv(out / "gemm.csv", rows, place, backend)
    table = [
        (s.name, r.candidate, 1e6 * r.timing.median, 1e6 * r.timing.p80, r.tops, r.speedup)
        for s, r in rows
    ]
    if json:
        keys = ("shape", "candidate", "median_us", "p80_us", "tops", "speedup_over_fp32")
        print_json(
            {
                "device": device_name(place),
                "backend": backend,
                "rows": [dict(zip(keys, r, strict=True)) for r in table],
            }
        )
        return
    columns = ("shape", "candidate", "median us", "p80 us", "TOPS", "x fp32")
    print_table(f"{device_name(place)}, ditq backend: {backend}", columns, table)
    say(f"{out / 'gemm.csv'}: {len(table)} rows")


@bench.command()
def methods(
    out: Annotated[Path, typer.Option(help="Folder for methods.csv and the statistics.")] = Path(
        "runs/methods"
    ),
    models: Annotated[str, typer.Option(help="Demo models, comma-separated; default: all.")] = "",
) -> None:
    """Compare all methods on the demo models, in integers, with the ablations of their papers.

    Takes tens of minutes on two cores; killed, the same command goes on where it was.

    Example: ditq bench methods --out runs/methods --models demo:digits
    """
    from ditq_bench.method_tables import chart, tables
    from ditq_bench.methods import MODELS, cases, read_rows, study
    from ditq_converters.progress import progress_bar
    from ditq_runtime.cli.output import say

    chosen = _chosen("--models", models, MODELS)
    studied = list(cases(chosen))
    with progress_bar("methods", len(studied)) as advance:
        for _ in study(out, studied):
            advance()
    rows = read_rows(out / "methods.csv")
    (out / "methods.md").write_text(tables(rows))
    chart(out / "methods.png", rows)
    say(f"{out / 'methods.md'}: tables of {len(rows)} rows; chart in {out / 'methods.png'}")


@bench.command()
def profiles(
    out: Annotated[Path, typer.Option(help="Folder for profiles.csv and the statistics.")] = Path(
        "runs/profiles"
    ),
    models: Annotated[str, typer.Option(help="Demo models, comma-separated; default: all.")] = "",
    methods: Annotated[
        str, typer.Option(help="meta, ditas, ptq4dit, htg, comma-separated; default: all.")
    ] = "",
) -> None:
    """Score the quantizers of the papers and of their code, simulated in float. Nothing here runs in integers.

    Takes minutes per row; killed, the same command goes on where it was.

    Example: ditq bench profiles --models demo:digits --methods ditas --out runs/profiles
    """
    from ditq_bench.method_tables import profile_table
    from ditq_bench.methods import MODELS, profile_cases, read_rows, study
    from ditq_converters.methods.profiles import PROFILES
    from ditq_converters.progress import progress_bar
    from ditq_runtime.cli.output import say

    chosen = _chosen("--models", models, MODELS)
    known = tuple(dict.fromkeys(method for method, _ in PROFILES))
    studied = list(profile_cases(chosen, _chosen("--methods", methods, known)))
    with progress_bar("profiles", len(studied)) as advance:
        for _ in study(out, studied, "profiles.csv"):
            advance()
    rows = read_rows(out / "profiles.csv")
    (out / "profiles.md").write_text(profile_table(rows))
    say(f"{out / 'profiles.md'}: {len(rows)} rows, all simulated in float")


def _chosen(option: str, given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Comma-separated names, all of them known; none given: all."""
    names = tuple(name.strip() for name in given.split(",")) if given else known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"{option}: unknown {unknown}; choose from {', '.join(known)}.")
    return names

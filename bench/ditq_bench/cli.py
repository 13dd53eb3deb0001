"""`ditq bench`: measure on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from ditq_bench.census.command import census
from ditq_bench.chosen import chosen_of
from ditq_bench.compiled.command import launches
from ditq_bench.host.command import host
from ditq_bench.kernels_command import kernels
from ditq_bench.model_command import model

bench = typer.Typer(
    help="Measure kernels, models and methods on this machine.", no_args_is_help=True
)


@bench.callback()
def _group() -> None:
    """Measure kernels, models and methods on this machine."""


bench.command()(census)
bench.command()(host)
bench.command()(kernels)
bench.command()(launches)
bench.command()(model)


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
    from ditq_bench.methods import MODELS, cases
    from ditq_runtime.cli.output import say

    rows = _studied(out, cases(chosen_of("--models", models, MODELS)), "methods")
    (out / "methods.md").write_text(tables(rows), encoding="utf-8")
    chart(out / "methods.png", rows)
    _page(out, "methods", rows)
    say(f"{out / 'methods.md'}: tables of {len(rows)} rows; chart in {out / 'methods.png'}")


@bench.command()
def flow(
    out: Annotated[Path, typer.Option(help="Folder for flow.csv and the statistics.")] = Path(
        "runs/flow"
    ),
    models: Annotated[str, typer.Option(help="Demo models, comma-separated; default: all.")] = "",
) -> None:
    """Compare all methods on the demo's Flux and its planted copies, with and without rounding by error feedback.

    Takes tens of minutes on two cores; killed, the same command goes on where it was.

    Example: ditq bench flow --out runs/flow --models demo:digits-flow
    """
    from ditq_bench.method_tables import flow_table
    from ditq_bench.methods import FLOWS, flow_cases
    from ditq_runtime.cli.output import say

    rows = _studied(out, flow_cases(chosen_of("--models", models, FLOWS)), "flow")
    (out / "flow.md").write_text(flow_table(rows), encoding="utf-8")
    _page(out, "flow", rows)
    say(f"{out / 'flow.md'}: a table of {len(rows)} rows")


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
    from ditq_bench.methods import MODELS, profile_cases
    from ditq_bench.simulated.profiles import PROFILES
    from ditq_runtime.cli.output import say

    chosen = chosen_of("--models", models, MODELS)
    known = tuple(dict.fromkeys(method for method, _ in PROFILES))
    studied = profile_cases(chosen, chosen_of("--methods", methods, known))
    rows = _studied(out, studied, "profiles")
    (out / "profiles.md").write_text(profile_table(rows), encoding="utf-8")
    _page(out, "profiles", rows)
    say(f"{out / 'profiles.md'}: {len(rows)} rows, all simulated in float")


@bench.command()
def papers(
    table: Annotated[
        str, typer.Argument(help="dit-256, dit-256-100, dit-512 or pixart-512.", metavar="TABLE")
    ],
    model: Annotated[str, typer.Argument(help="A diffusers folder or hub id.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="Folder for rows, checkpoints and samples.")] = Path(
        "runs/papers"
    ),
    prompts: Annotated[Path | None, typer.Option(help="Captions, for pixart-512.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Images; default: as published.")
    ] = None,
    calibration: Annotated[
        int | None, typer.Option(min=1, help="Samples to calibrate on; default: as published.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: as published.")] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Of reconstruction; default: as published.")
    ] = None,
) -> None:
    """A paper's table on your checkpoint, in integers, by its protocol, with its published figures beside.

    Hours on a GPU; killed, the same command goes on after the last finished row. FID is computed from the .npz of a
    row by the ADM evaluation suite; SQNR is printed.

    Example: ditq bench papers dit-256 facebook/DiT-XL-2-256 --out runs/dit-256
    """
    from ditq_bench.papers import COLUMNS, TABLES, Less, reproduce
    from ditq_bench.results import origin_of, told
    from ditq_converters.models.open import open_model
    from ditq_runtime.cli.device import place
    from ditq_runtime.cli.output import print_table, say

    (name,) = chosen_of("TABLE", table, tuple(TABLES))
    chosen, less = TABLES[name], Less(samples, calibration, steps, iterations)
    pipe = open_model(model)
    device = place("")
    pipe.to(device)
    rows = []
    for row in reproduce(chosen, pipe, out, prompts, less):
        say(f"{row['case']}: measured")
        rows.append([row[column] for column in COLUMNS])
    print_table(f"{chosen.title}; published: {chosen.measure}", COLUMNS, rows)
    say(f"published for full precision: {chosen.baseline or 'no figure'}; {out}")
    say(told(origin_of(device)))


@bench.command("full-size")
def full_size(
    out: Annotated[
        Path, typer.Option(help="Folder for the model, statistics, checkpoints and records.")
    ] = Path("runs/xl"),
    only: Annotated[
        str, typer.Option(help="Run only stages whose name contains one of these, comma-separated.")
    ] = "",
    blocks: Annotated[int, typer.Option(min=1, help="Of the model's width; DiT-XL/2 has 28.")] = 28,
    samples: Annotated[int, typer.Option(min=1, help="Guided samples to calibrate on.")] = 4,
    results: Annotated[
        Path | None, typer.Option(help="Folder for NAME.json, .csv and _parts.csv; default: OUT.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the files of results.")] = "full_size",
    remove: Annotated[bool, typer.Option("--remove", help="Remove the models afterwards.")] = False,
) -> None:
    """A model of DiT-XL/2's shape through calibration, conversion and loading: seconds, peak memory, bytes.

    Hours of a CPU with all stages; a stage that is done is not run again, and a killed conversion goes on after its
    last block. OUT/full_size.log says when, and where each stage tells its progress.

    Example: ditq bench full-size --blocks 2 --only build,calibrate,auto --out runs/xl-2 --name full_size_auto
    """
    from ditq_bench import full_size as work
    from ditq_bench import full_size_report

    records = work.run(out, only, blocks, samples)
    full_size_report.write(results or out, records, name)
    if remove:
        work.remove(out)


@bench.command()
def jitter(
    out: Annotated[Path, typer.Option(help="Folder for jitter.csv and the statistics.")] = Path(
        "runs/jitter"
    ),
    models: Annotated[str, typer.Option(help="Demo models, comma-separated; default: two.")] = "",
) -> None:
    """What the luck of 4-bit rounding is worth: methods with their smoothing factors perturbed by 5 %, four times each.

    Takes tens of minutes on two cores; killed, the same command goes on where it was.

    Example: ditq bench jitter --models demo:digits-salient --out runs/jitter
    """
    from ditq_bench.jitter import FIELDS, MODELS, study
    from ditq_bench.methods import read_rows
    from ditq_runtime.cli.output import print_table, say

    chosen = chosen_of("--models", models, MODELS)
    for row in study(out, chosen):
        say(f"{row['model']}, {row['case']}: measured")
    rows = read_rows(out / "jitter.csv")
    print_table("forced SQNR with perturbed factors", FIELDS, [tuple(row.values()) for row in rows])
    _page(out, "jitter", rows)
    say(f"{out / 'jitter.csv'}: {len(rows)} rows")


@bench.command()
def auto(
    out: Annotated[
        Path,
        typer.Option(help="Folder for the rows, their means, the picture, plans and statistics."),
    ] = Path("runs/auto"),
    models: Annotated[str, typer.Option(help="Demo models, comma-separated; default: all.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Calibrations per model.")] = 3,
    cases: Annotated[str, typer.Option(help="Globs of cases, comma-separated.")] = "*",
) -> None:
    """SQNR over bytes: `--method auto` at several budgets, and single methods with GPTQ and bias correction.

    Takes tens of minutes on two cores; killed, the same command goes on where it was.

    Example: ditq bench auto --models demo:digits --cases 'auto *' --out runs/auto
    """
    from ditq_bench.auto import study
    from ditq_bench.auto_cases import MODELS, cases_of
    from ditq_bench.frontier import FIELDS, draw, means, write_means
    from ditq_bench.methods import read_rows
    from ditq_runtime.cli.output import print_table, say

    chosen = chosen_of("--models", models, MODELS)
    known = dict.fromkeys(case for name in chosen for case in cases_of(name))
    if not any(fnmatch(case, glob) for case in known for glob in cases.split(",")):
        raise typer.BadParameter(f"--cases: none is like {cases!r}; there are {', '.join(known)}.")
    for row in study(out, chosen, repeats, cases.split(",")):
        say(f"{row['model']}, {row['case']}: {row['sqnr_guided_db']} dB")
    rows = read_rows(out / "auto.csv")
    write_means(out / "auto_mean.csv", rows)
    drawn = [model for model in MODELS if any(row["model"] == model for row in rows)]
    draw(out / "auto.png", means(rows), drawn)
    table = [[row[name] for name in FIELDS] for row in means(rows)]
    print_table("forced SQNR, means over calibrations", FIELDS, table)
    _page(out, "auto", means(rows))
    say(f"{out / 'auto_mean.csv'}: {len(table)} means of {len(rows)} rows; {out / 'auto.png'}")


def _page(out: Path, kind: str, rows: list[Any]) -> None:
    from ditq_bench.study_page import write_study_page
    from ditq_runtime.cli.output import say

    say(f"{write_study_page(out, kind, rows)}: open it in a browser")


def _studied(out: Path, cases: Iterable[Any], name: str) -> list[Any]:
    """Rows of OUT/NAME.csv once all these cases are in it."""
    from ditq_bench.methods import read_rows, study
    from ditq_converters.progress import progress_bar

    studied = list(cases)
    with progress_bar(name, len(studied)) as advance:
        for _ in study(out, studied, f"{name}.csv"):
            advance()
    return read_rows(out / f"{name}.csv")

"""`ditq bench kernels`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ditq_bench.chosen import chosen_of

COLUMNS = ("shape", "candidate", "us", "spread, %", "TOPS", "roof, %", "x bf16")

ShapesOption = Annotated[str, typer.Option(help="Named shapes, comma-separated.")]
BatchOption = Annotated[str, typer.Option(help="Multiples of a shape's images.")]
AgainstOption = Annotated[
    str,
    typer.Option(
        help="Baselines beside torch fp32 and bf16: compiled, int_mm, int_mm+dequant, torchao, torchao-fp8; "
        "where installed sdnq, comfy-kitchen, gemlite, sageattention, nunchaku."
    ),
]
AttentionOption = Annotated[bool, typer.Option(help="Also time attention.")]
OutOption = Annotated[Path, typer.Option(help="Folder for kernels.csv, plots and kernels.html.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda; default: cuda where there is one.")]
BudgetOption = Annotated[float, typer.Option(min=0.01, help="Seconds per shape.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def kernels(
    shapes: ShapesOption = "digits,dit-xl-256",
    batch: BatchOption = "1",
    against: AgainstOption = "int_mm,int_mm+dequant",
    attention: AttentionOption = True,
    out: OutOption = Path("runs/bench"),
    device: DeviceOption = "",
    budget: BudgetOption = 20.0,
    json: JsonOption = False,
) -> None:
    """Latency of the quantized linears and attentions against torch's, and their share of a measured roofline.

    Every row is checked against fp64 first; a wrong answer gets no time. kernels.csv names the backend of each: on a
    CPU, ops without int8 products run on the exact reference, slower than fp32.

    Example: ditq bench kernels --shapes dit-xl-256 --batch 1,16 --out runs/bench
    """
    from ditq_bench.attention import bench_attention
    from ditq_bench.ceilings import measure_ceilings
    from ditq_bench.gemm import BASELINES, bench_gemm
    from ditq_bench.measure import Row
    from ditq_bench.others import OTHERS
    from ditq_bench.plots import plot_roofline, plot_speedup
    from ditq_bench.results import Shape, device_name, write_csv
    from ditq_bench.shapes import ATTENTION_SHAPES, SHAPES
    from ditq_runtime.cli.device import place as device_of

    names = chosen_of("--shapes", shapes, tuple(SHAPES))
    others = chosen_of("--against", against, (*BASELINES, *OTHERS)) if against else ()
    place = device_of(device)
    check_installed(others, place)
    ceilings = measure_ceilings(place, min(budget, 5.0))
    rows: list[tuple[Shape, Row]] = []
    for images in _batches(batch):
        for name in names:
            for gemm in (shape.batched(images) for shape in SHAPES[name]):
                measured = bench_gemm(gemm, place, budget, ceilings, others)
                rows += [(gemm, row) for row in measured]
            for heads in ATTENTION_SHAPES.get(name, ()) if attention else ():
                shape = heads.batched(images)
                measured = bench_attention(shape, place, budget, ceilings, others)
                rows += [(shape, row) for row in measured]
            write_csv(out / "kernels.csv", rows, place)  # a killed run leaves what it has
    plot_speedup(out / "speedup.png", rows, device_name(place))
    plot_roofline(out / "roofline.png", rows, ceilings, device_name(place))
    _tell(out, rows, place, ceilings, json)


def _tell(out: Path, rows: list[Any], place: Any, ceilings: Any, json: bool) -> None:
    """Rows of a run on a device as a page, and as a table or JSON, with what to doubt of them."""
    import ditq_kernels as k
    from ditq_bench.page import facts_of, write_kernels_page
    from ditq_bench.results import device_name, doubts, origin_of, row_fields, told
    from ditq_runtime.cli.output import print_json, say

    origin, found, backend = origin_of(place), doubts(rows), k.backend_of("gemm_w8a8", place)
    table = [
        (
            s.name, r.candidate, 1e6 * r.timing.median, round(100 * r.timing.spread), r.tops,
            round(100 * (r.roof or 0)), r.speedup_bf16,
        )
        for s, r in rows
    ]  # fmt: skip
    measured_at = ", ".join(f"{kind} {rate / 1e12:.2f}" for kind, rate in ceilings.rates.items())
    roof = f"copy {ceilings.bandwidth / 1e9:.1f} GB/s; TOPS: {measured_at}"
    facts = {**facts_of(origin), "backend": backend, "ceilings": roof}
    write_kernels_page(out, COLUMNS, table, found, facts)
    if json:
        print_json(
            {
                "device": device_name(place),
                "backend": backend,
                "ceilings": {"bytes_per_second": ceilings.bandwidth} | ceilings.rates,
                "rows": [row_fields(shape, row, origin, place) for shape, row in rows],
            }
        )
        return
    say(f"{told(origin)}, backend {backend}; us: median, spread: (p80 - p20) / median")
    _print(COLUMNS, table)
    for sentence in found:
        say(sentence)
    say(f"ceilings of this run: {roof}")
    say(f"{out / 'kernels.csv'}: {len(rows)} rows; {out / 'kernels.html'}: open it in a browser")


def _print(columns: tuple[str, ...], table: list[tuple[Any, ...]]) -> None:
    """A table for every shape, so that they fit a terminal; one for all as CSV."""
    from ditq_runtime.cli.output import print_table
    from ditq_runtime.cli.voice import voice

    if voice.csv:
        print_table("kernels", columns, table)
        return
    for shape in dict.fromkeys(row[0] for row in table):
        rows = [row[1:] for row in table if row[0] == shape]
        print_table(f"\n{shape}", columns[1:], rows, ("TOPS", "roof, %"))


def _batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise typer.BadParameter(f"--batch: whole numbers, comma-separated, got {text!r}.")
    return [int(part) for part in parts]


def check_installed(names: tuple[str, ...], place: Any) -> None:
    """Refuse libraries that cannot be measured on a device."""
    import importlib.util

    from ditq_bench.others import OTHERS, refusal

    if any(n.startswith("torchao") for n in names) and importlib.util.find_spec("torchao") is None:
        raise typer.BadParameter("--against torchao: it is not installed; leave it out.")
    for name in names:
        reason = refusal(name, place) if name in OTHERS else ""
        if reason:
            raise typer.BadParameter(f"--against {name}: {reason}; leave it out.")

"""Rows on disk: a CSV that says on which machine, with which versions, at which commit it was measured."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

import ditq_kernels as k
from ditq_bench.measure import Row
from ditq_bench.shapes import AttentionShape, GemmShape
from ditq_bench.timing import Timing
from ditq_kernels.launch import cpu_features
from ditq_runtime.files import atomic_file
from ditq_runtime.version import __version__

Shape = GemmShape | AttentionShape
SPREAD = 0.2  # of the median: what rounds may differ by

FEW = 3  # doubts that are told one by one
ORIGIN = ("device", "ditq", "torch", "triton", "commit")
FIELDS = (
    *ORIGIN, "shape", "operations", "candidate", "backend",
    "timed_by", "p20_us", "median_us", "p80_us", "rounds", "tops", "bytes", "roof",
    "speedup_over_fp32", "speedup_over_bf16", "relative_error",
)  # fmt: skip


OPS = {  # how a candidate's name begins -> the op whose backend its row names; the first that fits
    "ditq quantize": "quantize_per_token",
    "ditq W8A8": "gemm_w8a8",
    "ditq W4A8 per group": "gemm_w4a8_per_group",
    "ditq W4A8": "gemm_w4a8",
    "ditq int8 QK": "attention_qk_int8_pv_int8",
}


def backend_of(candidate: str, device: torch.device) -> str:
    """The backend that runs a candidate: that of the op of ours it times, "torch" for others."""
    op = next((op for prefix, op in OPS.items() if candidate.startswith(prefix)), "")
    return k.backend_of(op, device) if op else "torch"


def device_name(device: torch.device) -> str:
    """What a result is labelled with: the GPU's name, or the processor, its instructions and the thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{cpu_features.describe()}, {count} thread{'s' * (count != 1)}"


def row_fields(
    shape: Shape, row: Row, origin: tuple[str, ...], device: torch.device
) -> dict[str, str]:
    """One row by name in FIELDS. roof: the time at the ceilings measured in the same run / the median."""
    t = row.timing
    times = (f"{1e6 * seconds:.1f}" for seconds in (t.p20, t.median, t.p80))
    values = (
        *origin, shape.name, shape.operations, row.candidate,
        backend_of(row.candidate, device),
        t.how, *times, t.rounds, f"{row.tops:.4f}", row.num_bytes, "" if row.roof is None else f"{row.roof:.3f}",
        f"{row.speedup:.3f}", f"{row.speedup_bf16:.3f}", f"{row.error:.2e}",
    )  # fmt: skip
    return dict(zip(FIELDS, map(str, values), strict=True))


def origin_of(device: torch.device) -> tuple[str, ...]:
    """ORIGIN, as every row says it; the device with its threads."""
    return (device_name(device), __version__, torch.__version__, _triton(), commit())


def told(origin: Sequence[str]) -> str:
    """ORIGIN as a sentence's beginning: who measured, and on what."""
    device, ours, torchs, tritons, at = origin
    return f"{device}, ditq {ours} ({at}), torch {torchs}, triton {tritons}"


def write_csv(path: Path, rows: list[tuple[Shape, Row]], device: torch.device) -> None:
    """Write all rows atomically."""
    origin = origin_of(device)
    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(row_fields(shape, row, origin, device) for shape, row in rows)


def commit() -> str:
    """Short hash of the source tree this runs from; "unknown" outside of its checkout, as where ditq is installed.

    A checkout that ditq is merely installed into, such as the caller's own with a virtual environment, is not it.
    """
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):
        return "unknown"
    return _git("rev-parse", "--short", "HEAD") or "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        return ""


def doubts(rows: Sequence[tuple[Shape, Row]]) -> list[str]:
    """One sentence per row that should not be quoted: its rounds disagree, or it beats the roof of its own run."""
    found = []
    for shape, row in rows:
        name = f"{shape.name}, {row.candidate}"
        found += doubt(name, row.timing)
        if row.roof is not None and row.roof > 1:
            found.append(
                f"{name}: {100 * row.roof:.0f} % of the roof; the machine was busy when the roof was measured"
            )
    return found if len(found) <= FEW else [*found[:FEW], _rest(rows, len(found) - FEW)]


def _rest(rows: Sequence[tuple[Shape, Row]], more: int) -> str:
    worst = max(row.timing.spread for _, row in rows)
    return f"{more} more rows like these, the worst rounds differ by {100 * worst:.0f} %: the machine is busy"


def doubt(name: str, timing: Timing) -> list[str]:
    """A sentence where the rounds of one measurement disagree."""
    if timing.spread <= SPREAD:
        return []
    return [f"{name}: rounds differ by {100 * timing.spread:.0f} % of the median; run it again"]


def _triton() -> str:
    try:
        return version("triton")
    except ImportError:
        return "not installed"

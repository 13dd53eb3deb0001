"""Rows on disk: a CSV that says on which machine, with which versions, at which commit it was measured."""

from __future__ import annotations

import csv
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from ditq_bench.gemm import GemmRow
from ditq_bench.shapes import GemmShape
from ditq_runtime.files import atomic_file

FIELDS = (
    "device", "torch", "triton", "commit", "shape", "tokens", "inputs", "outputs", "candidate", "backend",
    "p20_us", "median_us", "p80_us", "rounds", "tops", "speedup_over_fp32", "relative_error",
)  # fmt: skip


def device_name(device: torch.device) -> str:
    """What a result is labelled with: the GPU's name, or the processor and the thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def write_csv(
    path: Path, rows: list[tuple[GemmShape, GemmRow]], device: torch.device, backend: str
) -> None:
    """Write all rows atomically."""
    common = (device_name(device), torch.__version__, _triton(), commit())
    with atomic_file(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for shape, row in rows:
            t = row.timing
            times = (f"{1e6 * seconds:.1f}" for seconds in (t.p20, t.median, t.p80))
            error = "" if row.error is None else f"{row.error:.2e}"
            ran = backend if row.candidate.startswith("ditq") else "torch"
            sizes = (shape.name, shape.tokens, shape.inputs, shape.outputs)
            figures = (t.rounds, f"{row.tops:.4f}", f"{row.speedup:.3f}", error)
            writer.writerow((*common, *sizes, row.candidate, ran, *times, *figures))


def commit() -> str:
    """Short hash of the source tree this runs from; "unknown" outside a git checkout."""
    run = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


def _triton() -> str:
    try:
        return version("triton")
    except ImportError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

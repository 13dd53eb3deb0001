"""Bytes of memory: how many a process holds, gives back, and is allowed."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import torch

SLACK = 16 * 2**20  # libraries and pools that only the whole run touches
UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """`6GiB`, `500 MB`, `1.5gib` -> bytes; ValueError with a sentence for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", text.upper(), re.ASCII)
    size = float(match[1]) * UNITS.get(match[2], 0) if match else 0
    if size < 1:
        raise ValueError(
            f"a memory budget is a number and a unit, such as 6GiB or 500MB; got {text!r}"
        )
    return int(size)


def format_bytes(nbytes: float) -> str:
    """Bytes as MiB below one GiB, as GiB above."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def peak_rss() -> int:
    """Most bytes of main memory this process has held at once, since it started.

    On Linux from /proc: getrusage there also counts what the parent held before it became this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        if "VmHWM" in lines:
            return 1024 * int(lines["VmHWM"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def held(device: torch.device) -> int:
    """Bytes that this process holds now: on the GPU, or in main memory (Linux; elsewhere its peak so far)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_rss()
    return int(statm.read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def give_back() -> None:
    """Return freed memory to the system where the C library can (glibc): it keeps what lies between live tensors."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)

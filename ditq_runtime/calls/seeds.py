"""Seeds from counters: what is random in a calibration depends on what it belongs to, never on what ran before it."""

from __future__ import annotations

import numpy as np
import torch

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(*counters: int) -> int:
    """A well-mixed 63-bit seed from counters (Steele, Lea and Flood 2014, the SplitMix64 finalizer)."""
    state = 0
    for counter in counters:
        state = (state + counter + GOLDEN) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state >> 1


def generator(*counters: int) -> torch.Generator:
    """A CPU generator that these counters alone decide."""
    return torch.Generator().manual_seed(splitmix64(*counters))


def row_keys(seed: int, given: int, call: int, rows: int) -> np.ndarray:
    """int64 [rows]: `splitmix64(splitmix64(seed, given, call), row)` of every row."""
    with np.errstate(over="ignore"):  # wraps, as it should
        state = np.full(rows, GOLDEN + splitmix64(seed, given, call) & MASK64, dtype=np.uint64)
        state = _finalize(state) + np.arange(rows, dtype=np.uint64) + np.uint64(GOLDEN)
        return (_finalize(state) >> np.uint64(1)).astype(np.int64)


def _finalize(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))

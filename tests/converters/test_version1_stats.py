"""Statistics of version 1, written by `calibrate` when there was no other version, are read to the same bits.

tests/fixtures/version1/make.py says how they were made.
"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ditq_converters import CalibrationStats

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "version1" / "statistics"


def digest(tensor):
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}|{list(tensor.shape)}|".encode() + raw).hexdigest()[:16]


@pytest.fixture(params=["dit_htg", "pixart"])
def case(request):
    """The opened statistics, their shards, and what version 1 read from them."""
    folder = FIXTURES / request.param
    return SimpleNamespace(
        stats=CalibrationStats.open(folder),
        shards=[load_file(path) for path in sorted(folder.glob("call_*.safetensors"))],
        **json.loads((FIXTURES / f"{request.param}.json").read_text()),
    )


def test_calls_and_timesteps(case):
    stats = case.stats
    assert (stats.calls, stats.timesteps) == (len(case.shards), case.timesteps)
    assert stats.has_attention == case.has_attention
    assert stats.manifest["model_hash"] == case.model_hash


def test_ranges(case):
    assert {
        name: [digest(side) for side in case.stats.ranges(name)] for name in case.ranges
    } == case.ranges
    for name in case.ranges:
        for side, bound in zip(case.stats.ranges(name), ("min", "max"), strict=True):
            assert torch.equal(
                side, torch.stack([shard[f"{name}.{bound}"] for shard in case.shards])
            )


def test_rows(case):
    for name, expected in case.rows.items():
        rows, calls = case.stats.rows(name)
        assert list(calls) == case.row_calls
        assert digest(rows) == expected
        assert torch.equal(rows, torch.stack([s[f"{name}.rows"].float() for s in case.shards]))


def test_every_tensor_is_covered(case):
    named = {f"{name}.{side}" for name in case.ranges for side in ("min", "max")}
    assert case.shards[0].keys() == named | {f"{name}.rows" for name in case.rows}

"""Asset files: equal content, equal bytes."""

import torch
from safetensors import safe_open

from ditq_converters.demo.bundle import load_asset, save_asset


def test_equal_assets_have_equal_bytes_that_safetensors_reads(tmp_path):
    tensors = {"b": torch.arange(6).reshape(2, 3).T.half(), "a": torch.ones(1, dtype=torch.float64)}
    metadata = {f"key {number}": f"é {number}" for number in range(20)}
    first, second = tmp_path / "first", tmp_path / "second"
    save_asset(first, tensors, metadata)
    save_asset(second, dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert first.read_bytes() == second.read_bytes()

    with safe_open(first, "pt") as file:
        assert file.metadata() == metadata
    loaded = load_asset("first", tmp_path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)

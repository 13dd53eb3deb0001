"""Families read block by block from disk: the same bytes as in memory, tables and two kinds of blocks included."""

import pytest
import torch

from ditq_converters import Recipe, convert
from ditq_converters.memory import held

FILE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name", ["pixart-sigma", "sd3.5", "flux-dev"])
def test_converted_from_disk_it_is_the_same_file(make_case, tmp_path, monkeypatch, name):
    model, _ = make_case(name)
    model.save_pretrained(tmp_path / "float")
    convert(model, Recipe("linear"), out=tmp_path / "memory", quiet=True)
    monkeypatch.setattr("ditq_converters.models.fits", lambda *_: False)
    budget = 2 * held(torch.device("cpu"))
    packed = convert(
        str(tmp_path / "float"),
        Recipe("linear"),
        out=tmp_path / "disk",
        quiet=True,
        memory_budget=budget,
    )
    assert next(packed.parameters()).is_meta
    for file in (FILE, "config.json"):
        assert (tmp_path / "disk" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()

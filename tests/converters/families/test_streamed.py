"""Families read block by block from disk: the same bytes as in memory, tables and two kinds of blocks included."""

import pytest
import torch

from ditq_converters import Recipe, convert
from ditq_converters.memory import held

FILE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("pixart-sigma", Recipe("linear")),
        ("sd3.5", Recipe("linear")),
        ("flux-dev", Recipe("linear")),
        ("sd3.5-attention", Recipe("linear", attention="int8")),
        ("flux-attention", Recipe("linear", attention="bf16")),
    ],
)
def test_converted_from_disk_it_is_the_same_file(make_case, tmp_path, monkeypatch, name, recipe):
    model, _ = make_case(name)
    model.save_pretrained(tmp_path / "float")
    convert(model, recipe, out=tmp_path / "memory", quiet=True)
    monkeypatch.setattr("ditq_converters.models.open.fits", lambda *_: False)
    budget = 2 * held(torch.device("cpu"))
    packed = convert(
        str(tmp_path / "float"),
        recipe,
        out=tmp_path / "disk",
        quiet=True,
        memory_budget=budget,
    )
    assert next(packed.parameters()).is_meta
    for file in (FILE, "config.json"):
        assert (tmp_path / "disk" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()

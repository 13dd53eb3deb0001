"""Perturbed methods: the factors move by as much as asked, the rest stays, and nothing is left behind."""

import csv
from types import SimpleNamespace

import pytest
import torch

from ditq_bench import jitter
from ditq_converters.methods import METHODS, SiteData


def site():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, 4000, generator=generator) + 1
    weight = torch.randn(3, 4000, generator=generator, dtype=torch.float64)
    return SiteData("qkv", x.amin(1), x.amax(1), weight)


def test_factors_are_off_by_the_amount_and_shifts_are_not():
    plain = METHODS["htg"].transform([site()], METHODS["htg"].options())
    with jitter.perturbed("htg", 0.05, seed=3) as name:
        moved = METHODS[name].transform([site()], METHODS[name].options())
    assert torch.equal(moved.sites["qkv"].shift, plain.sites["qkv"].shift)
    assert moved.group_of_call == plain.group_of_call
    ratio = (moved.sites["qkv"].smooth / plain.sites["qkv"].smooth).log()
    # 4000 draws: the deviation is known to 1 / sqrt(8000), 1.1 %
    assert float(ratio.std()) == pytest.approx(0.05, rel=0.05)
    assert abs(float(ratio.mean())) < 0.004


def test_the_seed_decides_and_the_table_of_methods_is_left_as_it_was():
    before, found = list(METHODS), []
    for seed in (1, 1, 2):
        with jitter.perturbed("ptq4dit", 0.05, seed) as name:
            found.append(
                METHODS[name].transform([site()], METHODS[name].options()).sites["qkv"].smooth
            )
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    with pytest.raises(RuntimeError, match="stop"), jitter.perturbed("ditas", 0.05, 0):
        raise RuntimeError("stop")
    assert before == list(METHODS)


def test_rows_hold_mean_and_deviation(tmp_path, monkeypatch):
    monkeypatch.setattr(jitter, "prepare", lambda model, folder: SimpleNamespace())
    values = iter([1.0, 2.0, 3.0, 6.0, 9.0] * len(jitter.CASES))
    monkeypatch.setattr(jitter, "forced", lambda recipe, subject: next(values))
    (tmp_path / "out").mkdir()
    rows = list(jitter.study(tmp_path / "out", ["demo:digits-salient"]))
    assert [row["case"] for row in rows] == list(jitter.CASES)
    assert (rows[0]["as_it_is_db"], rows[0]["mean_db"], rows[0]["deviation_db"]) == (
        "9.00", "3.00", "2.16",
    )  # fmt: skip
    with (tmp_path / "out" / "jitter.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert [row["case"] for row in kept] == list(jitter.CASES)
    assert list(jitter.study(tmp_path / "out", ["demo:digits-salient"])) == []  # all there

"""Sampled rows: the very rows of an independent recording, spread over both halves, whatever the batch split."""

import itertools
import json

import pytest
import torch
from safetensors import safe_open

from ditq_converters import CalibrationStats, StatisticsError, calibrate
from ditq_converters.calibrate.rows import RowPlan, evenly_spaced
from ditq_converters.calibrate.stats import shard_path

TOKENS = 16  # of the tiny DiT
SITES = [f"transformer_blocks.{b}.{s}" for b in (0, 1) for s in ("qkv", "o_proj", "fc1", "fc2")]
READER = {
    "qkv": "attn1.to_k",
    "o_proj": "attn1.to_out.0",
    "fc1": "ff.net.0.proj",
    "fc2": "ff.net.2",
}
SMALL = {"steps": 3, "samples": 4, "guidance": 2.0, "quiet": True}


def recording(pipe, out, **changes):
    """Calibrate, and record by own hooks what every site read: site -> list of inputs, one per forward."""
    seen, hooks = {site: [] for site in SITES}, []
    for site, inputs in seen.items():
        block, _, name = site.rpartition(".")
        module = pipe.transformer.get_submodule(f"{block}.{READER[name]}")
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, a, inputs=inputs: inputs.append(a[0].clone())
            )
        )
    stats = calibrate(pipe, out, **{**SMALL, **changes})
    for hook in hooks:
        hook.remove()
    return stats, seen


def positions(rows, batch):
    """(batch index, token) of every row in `batch` [B, tokens, K], by value; exactly one place for each."""
    flat = batch.flatten(0, 1)
    matches = (rows[:, None] == flat).all(2)
    assert matches.sum(1).tolist() == [1] * len(rows)
    return [divmod(int(i), batch.shape[1]) for i in matches.int().argmax(1)]


def test_rows_are_rows_of_the_inputs_in_pairs_of_both_halves(make_pipeline, tmp_path):
    stats, seen = recording(make_pipeline(), tmp_path, rows=10)
    chosen = []
    for site in SITES:
        rows, calls = stats.rows(site)
        assert rows.dtype == torch.float32
        assert (tuple(rows.shape[:2]), calls) == ((3, 10), (0, 1, 2))
        found = [positions(rows[call], seen[site][call]) for call in calls]
        for places in found:
            cond, null = places[:5], places[5:]
            assert all(sample < 4 for sample, _ in cond)
            assert null == [(sample + 4, token) for sample, token in cond]
            assert len(set(places)) == 10
        chosen.append(found)
    assert all(found == chosen[0] for found in chosen)  # the same rows for all sites
    assert len({tuple(places) for places in chosen[0]}) == 3  # other rows at every call
    assert len({sample for places in chosen[0] for sample, _ in places[:5]}) == 4  # all samples


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_rows_do_not_depend_on_the_batch_split(make_pipeline, tmp_path, micro_batch):
    """P22. The same places exactly; the values up to the order of sums in a GEMM, as for the ranges: 1e-4."""
    whole, _ = recording(make_pipeline(), tmp_path / "whole", rows=9)
    split, seen = recording(make_pipeline(), tmp_path / "split", rows=9, micro_batch=micro_batch)
    sizes = [len(batch) // 2 for batch in seen[SITES[0]]][: -(-4 // micro_batch)]
    for site in SITES:
        ours, theirs = split.rows(site)[0], whole.rows(site)[0]
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
        forwards = seen[site][: len(sizes)]  # those of call 0, put together as [cond; null]
        halves = [torch.cat([f.chunk(2)[half] for f in forwards]) for half in (0, 1)]
        places = positions(ours[0], torch.cat(halves))
        assert [sample < 4 for sample, _ in places] == [True] * 5 + [False] * 4


def test_without_guidance_all_rows_are_conditional(make_pipeline, tmp_path):
    stats, seen = recording(make_pipeline(), tmp_path, rows=7, guidance=1.0)
    rows, _ = stats.rows(SITES[0])
    assert len(seen[SITES[0]][0]) == 4
    assert len(set(positions(rows[0], seen[SITES[0]][0]))) == 7


@pytest.mark.parametrize(("guidance", "most"), [(1.0, TOKENS), (2.0, 2 * TOKENS)])
def test_a_run_with_fewer_rows_keeps_all_of_them(make_pipeline, tmp_path, guidance, most):
    stats, seen = recording(
        make_pipeline(), tmp_path, rows=1000, samples=1, steps=1, guidance=guidance
    )
    rows, _ = stats.rows(SITES[3])
    assert rows.shape == (1, most, 256)
    everything = seen[SITES[3]][0].flatten(0, 1)
    assert torch.equal(rows[0].sort(0).values, everything.sort(0).values)


def test_rows_change_no_range(make_pipeline, tmp_path):
    some = calibrate(make_pipeline(), tmp_path / "some", **SMALL)
    none = calibrate(make_pipeline(), tmp_path / "none", rows=0, **SMALL)
    for site in SITES:
        for a, b in zip(some.ranges(site), none.ranges(site), strict=True):
            assert torch.equal(a, b)
    assert some.rows(SITES[0])[0].shape == (3, 64, 64)  # the default
    with safe_open(shard_path(none.folder, 0), "pt") as file:
        assert not [name for name in file.keys() if name.endswith("rows")]  # noqa: SIM118
    with pytest.raises(StatisticsError, match=r"holds no sampled rows; calibrate .* --rows 64"):
        none.rows(SITES[0])


def test_rows_are_chosen_by_the_seed():
    picks = [
        RowPlan(8, (0,), 4, True, seed).select(call, TOKENS)
        for seed, call in itertools.product((0, 1), (0, 1))
    ]
    assert len({(*p.sample.tolist(), *p.token.tolist()) for p in picks}) == 4
    again = RowPlan(8, (0,), 4, True, 0).select(0, TOKENS)
    assert torch.equal(again.sample, picks[0].sample)
    assert torch.equal(again.token, picks[0].token)


def test_every_row_can_be_chosen_about_equally():
    """4 of 16 rows at 800 calls: each 200 times, a binomial with deviation sqrt(800 * 1/4 * 3/4) = 12.2; 5 of them."""
    plan, counts = RowPlan(4, (), 2, False), torch.zeros(2, 8)
    for call in range(800):
        chosen = plan.select(call, 8)
        counts[chosen.sample, chosen.token] += 1
    assert counts.sum() == 3200
    assert (counts - 200).abs().max() < 62


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_stored_as_they_are(make_pipeline, tmp_path, dtype):
    pipe = make_pipeline()
    pipe.transformer.to(dtype)
    stats, seen = recording(pipe, tmp_path, rows=4, steps=1)
    with safe_open(shard_path(tmp_path, 0), "pt") as file:
        stored = file.get_tensor(f"{SITES[0]}.rows")
    assert stored.dtype == dtype
    rows, _ = stats.rows(SITES[0])
    assert torch.equal(rows[0], stored.float())
    low, high = (side[0] for side in stats.ranges(SITES[0]))
    assert bool(((rows[0] >= low) & (rows[0] <= high)).all())
    assert bool((seen[SITES[0]][0].flatten(0, 1)[:, None] == stored).all(2).any(0).all())


def test_long_runs_keep_rows_at_50_evenly_spaced_calls():
    assert evenly_spaced(3) == (0, 1, 2)
    assert evenly_spaced(50) == tuple(range(50))
    for calls in (51, 100, 250, 1000):
        spaced = evenly_spaced(calls)
        assert len(set(spaced)) == 50
        assert (spaced[0], spaced[-1]) == (0, calls - 1)
        gaps = {after - before for before, after in itertools.pairwise(spaced)}
        assert max(gaps) - min(gaps) <= 1


def test_only_the_listed_calls_hold_rows(make_pipeline, tmp_path, monkeypatch):
    import sys

    module = sys.modules["ditq_converters.calibrate.run"]
    monkeypatch.setattr(module, "evenly_spaced", lambda calls: (0, calls - 1))
    stats, seen = recording(make_pipeline(), tmp_path, rows=4)
    rows, calls = stats.rows(SITES[2])
    assert calls == (0, 2)
    assert stats.manifest["rows"] == {"count": 4, "calls": [0, 2]}
    assert positions(rows[1], seen[SITES[2]][2])
    with safe_open(shard_path(tmp_path, 1), "pt") as file:
        assert not [name for name in file.keys() if name.endswith("rows")]  # noqa: SIM118


def test_statistics_without_a_word_on_rows_are_read(make_pipeline, tmp_path):
    """Folders of the first release."""
    calibrate(make_pipeline(), tmp_path, rows=0, **SMALL)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["rows"]
    path.write_text(json.dumps(manifest))
    stats = CalibrationStats.open(tmp_path)
    assert stats.ranges(SITES[0])[0].shape == (3, 64)
    with pytest.raises(StatisticsError, match="holds no sampled rows"):
        stats.rows(SITES[0])


def test_a_damaged_shard_is_named(make_pipeline, tmp_path):
    stats = calibrate(make_pipeline(), tmp_path, **SMALL)
    path = shard_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StatisticsError, match=r"call_0001\.safetensors: cannot read"):
        stats.rows(SITES[0])

"""Sampled rows: the very rows of an independent recording, chosen by seed, input, call and row alone."""

import itertools

import pytest
import torch
from safetensors import safe_open

from ditq_converters import StatisticsError, calibrate
from ditq_converters.calibrate.rows import RowChoice, evenly_spaced
from ditq_converters.calibrate.stats import shard_path
from ditq_runtime.calls.seeds import row_keys, splitmix64

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
    """Place in `batch` [B, tokens, K], flattened, of every row, by value; exactly one for each."""
    matches = (rows[:, None] == batch.flatten(0, 1)).all(2)
    assert matches.sum(1).tolist() == [1] * len(rows)
    return matches.int().argmax(1).tolist()


def test_keys_are_splitmix64_of_their_counters():
    """In numpy, against the one in Python integers, which test_schedule holds to the published constants."""
    keys = row_keys(3, 1, 7, 50)
    assert keys.tolist() == [splitmix64(splitmix64(3, 1, 7), row) for row in range(50)]


def test_rows_are_those_of_the_lowest_keys(make_pipeline, tmp_path):
    stats, seen = recording(make_pipeline(), tmp_path, rows=10)
    for site in SITES:
        rows, calls = stats.rows(site)
        assert rows.dtype == torch.float32
        assert (tuple(rows.shape[:2]), calls) == ((3, 10), (0, 1, 2))
        for call in calls:  # 4 samples and 4 nulls of 16 tokens
            keys = [splitmix64(splitmix64(0, 0, call), row) for row in range(8 * TOKENS)]
            expected = sorted(range(8 * TOKENS), key=keys.__getitem__)[:10]
            assert positions(rows[call], seen[site][call]) == expected


def test_rows_of_several_inputs_are_shared_out(make_pipeline, tmp_path):
    """10 rows of 4 inputs: each keeps 3, and of all 12 the 10 lowest keys stay."""
    stats, seen = recording(make_pipeline(), tmp_path, rows=10, batch=1)
    rows, _ = stats.rows(SITES[1])
    kept = []
    for given in range(4):
        keys = [(splitmix64(splitmix64(0, given, 2), row), row) for row in range(2 * TOKENS)]
        kept += [(key, given, row) for key, row in sorted(keys)[:3]]
    for found, (_, given, row) in zip(rows[2], sorted(kept)[:10], strict=True):
        assert torch.equal(found, seen[SITES[1]][3 * given + 2].flatten(0, 1)[row])


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
    with safe_open(shard_path(none.folder / "merged" / "transformer", 0), "pt") as file:
        assert not [name for name in file.keys() if name.endswith("rows")]  # noqa: SIM118
    with pytest.raises(StatisticsError, match=r"holds no sampled rows; calibrate .* --rows 64"):
        none.rows(SITES[0])


def test_calls_at_one_timestep_share_their_rows():
    """Guidance in two forwards: the lowest keys of both together."""
    choice, x = RowChoice(5, 0, 0), torch.arange(40.0)[:, None]
    both = choice.of(x[:20], 0).joined(choice.of(x[20:], 1), 5)
    keys = [splitmix64(splitmix64(0, 0, i // 20), i % 20) for i in range(40)]
    assert both.rows[:, 0].tolist() == sorted(range(40), key=keys.__getitem__)[:5]


def test_every_row_can_be_chosen_about_equally():
    """4 of 16 rows at 800 calls: each 200 times, a binomial with deviation sqrt(800 * 1/4 * 3/4) = 12.2; 5 of them."""
    choice, counts = RowChoice(4, 0, 0), torch.zeros(16)
    for call in range(800):
        counts[choice.of(torch.arange(16.0)[:, None], call).rows[:, 0].long()] += 1
    assert counts.sum() == 3200
    assert (counts - 200).abs().max() < 62


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_stored_as_they_are(make_pipeline, tmp_path, dtype):
    pipe = make_pipeline()
    pipe.transformer.to(dtype)
    stats, seen = recording(pipe, tmp_path, rows=4, steps=1)
    with safe_open(shard_path(tmp_path / "merged" / "transformer", 0), "pt") as file:
        stored = file.get_tensor(f"{SITES[0]}.rows")
    assert stored.dtype == dtype
    rows, _ = stats.rows(SITES[0])
    assert torch.equal(rows[0], stored.float())
    assert bool((seen[SITES[0]][0].flatten(0, 1)[:, None] == stored).all(2).any(0).all())


def test_long_runs_give_rows_of_50_evenly_spaced_timesteps(make_pipeline, tmp_path):
    assert evenly_spaced(3) == (0, 1, 2)
    for calls in (51, 100, 250, 1000):
        spaced = evenly_spaced(calls)
        assert len(set(spaced)) == 50
        assert (spaced[0], spaced[-1]) == (0, calls - 1)
        gaps = {after - before for before, after in itertools.pairwise(spaced)}
        assert max(gaps) - min(gaps) <= 1
    long = {**SMALL, "steps": 52, "samples": 1, "guidance": 1.0}
    rows, calls = calibrate(make_pipeline(), tmp_path, rows=2, **long).rows(SITES[2])
    assert (rows.shape[0], calls) == (50, evenly_spaced(52))


def test_a_damaged_file_is_named(make_pipeline, tmp_path):
    stats = calibrate(make_pipeline(), tmp_path, **SMALL)
    path = shard_path(tmp_path / "merged" / "transformer", 1)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StatisticsError, match=r"call_0001\.safetensors: cannot read"):
        stats.rows(SITES[0])

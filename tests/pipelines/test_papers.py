"""Tables of papers from end to end on tiny stand-ins: every row is calibrated, converted, judged and kept."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from ditq_bench.papers import COLUMNS, TABLES, Less, reproduce
from ditq_converters.plan.file import read_plan

LESS = Less(samples=2, calibration=2, steps=2, iterations=2)


@pytest.fixture(scope="module")
def classes():
    """A DiT of two blocks with a VAE of one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2,
            sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
        ).eval()  # fmt: skip
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4,), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=8
        ).eval()  # fmt: skip
        for block in transformer.transformer_blocks:
            torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
    return diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())


def test_figures_are_taken_on_as_many_samples_as_published():
    """FID-10K at 256 pixels, FID-5K at 512."""
    assert {name: table.samples for name, table in TABLES.items()} == {
        "dit-256": 10000, "dit-256-100": 10000, "dit-512": 5000, "pixart-512": 1000,
    }  # fmt: skip


def test_a_table_of_classes(classes, tmp_path):
    table = TABLES["dit-256"]
    assert [row.published for row in table.rows[:3]] == ["9.05", "8.77", "9.17"]
    table = replace(table, rows=(table.rows[1], table.rows[2], table.rows[4]))
    rows = list(reproduce(table, classes, tmp_path, less=LESS))
    assert [row["case"] for row in rows] == [row.case for row in table.rows]
    assert [row["published"] for row in rows] == ["8.77", "9.17", "6.78"]
    for row in rows:
        assert set(row) == set(COLUMNS)
        assert row["SQNR forced, dB"] > 5
        with np.load(tmp_path / row["samples of FID"]) as samples:
            (images,) = samples.values()
        assert images.shape == (2, 8, 8, 3)
        assert images.dtype == np.uint8
    sizes = {row["case"]: row["bytes"] for row in rows}
    assert sizes["HTG W4A8"] < sizes["HTG W8A8"]
    plan = read_plan(tmp_path / "ptq4dit-w4a8" / "ditq" / "plan.json")
    inner = [entry for entry in plan.linears if entry.is_integer]
    assert {(e.rounding, e.iterations, e.activations) for e in inner} == {
        ("reconstruct", 2, "static"),
        ("gptq", 400, "static"),  # modulation, whose inputs the papers quantize
    }
    assert {e.weight_ranges for e in plan.linears if e.is_integer} == {"ptq4dit_pct"}
    plan = read_plan(tmp_path / "htg-w4a8" / "ditq" / "plan.json")
    assert {s.options.get("groups_per_layer") for s in plan.sites if s.method == "htg"} == {True}
    before = (tmp_path / "htg-w4a8.json").stat().st_mtime_ns
    assert list(reproduce(table, classes, tmp_path, less=LESS)) == rows
    assert (tmp_path / "htg-w4a8.json").stat().st_mtime_ns == before


def test_metas_table_has_its_groups(build_pipe, call_of, tmp_path):
    """Groups of 128 where the paper has them, else one for all inputs of a linear; one call or all."""
    captions = tmp_path / "captions.txt"
    captions.write_text("a red fox\ntwo boats\n", encoding="utf-8")
    table = TABLES["pixart-512"]
    table = replace(table, rows=table.rows[2:])
    out = tmp_path / "out"
    pipe = build_pipe("pixart-alpha")
    unsaid = ("prompt", "num_inference_steps", "output_type")
    call = {name: value for name, value in call_of(pipe).items() if name not in unsaid}
    rows = list(reproduce(table, pipe, out, captions, LESS, **call))
    assert [row["published"] for row in rows] == ["4.15", "4.28", "12.36"]
    groups, calls = [], []
    for row in table.rows:
        stem = row.case.lower().replace(",", "").replace(" ", "-")
        plan = read_plan(out / stem / "ditq" / "plan.json")
        (fc2,) = (e for e in plan.linears if e.name == "transformer_blocks.0.ff.net.2")
        assert (fc2.weights, fc2.symmetric, fc2.activations) == ("w4g", True, "static")
        groups.append(fc2.group_size)
        calls.append({site.calls for site in plan.sites})
    assert groups == [256, 256, 128]
    assert calls == [{"all"}, {"noisiest"}, {"noisiest"}]


def test_captions_where_they_belong(classes, tmp_path):
    with pytest.raises(ValueError, match=r"PixArt-alpha 512.*needs --prompts, a file of captions"):
        next(reproduce(TABLES["pixart-512"], classes, tmp_path))
    with pytest.raises(ValueError, match=r"DiT-XL/2.*takes no --prompts"):
        next(reproduce(TABLES["dit-512"], classes, tmp_path, prompts="captions.txt"))

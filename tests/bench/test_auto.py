"""The study of auto: what it converts, its means by hand, its picture; judged digits are never calibrated on."""

import math

import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image

from ditq_bench.auto import CALIBRATED, JUDGED, forced_db
from ditq_bench.auto_cases import AUTO, DITS, FLOWS, MODELS, SINGLE, cases_of
from ditq_bench.front_page import places
from ditq_bench.frontier import FIELDS, MEASURED, draw, means, write_means
from ditq_bench.hidden import HIDDEN, hide, reveal
from ditq_bench.methods import METHOD_NAMES, read_rows
from ditq_converters import Recipe
from ditq_converters.evaluate.runs import Recorded


def row(case, repeat, guided, nbytes, model="demo:digits", **changes):
    base = dict.fromkeys(MEASURED, "") | {"commit": "abc"}
    return base | {
        "model": model, "case": case, "repeat": str(repeat), "sqnr_guided_db": guided, "bytes": nbytes,
        **changes,
    }  # fmt: skip


ROWS = [
    row("auto smallest", 0, "44.0", "1000000"),
    row("auto smallest", 1, "43.0", "1000001", commit="def"),
    row("auto largest", 0, "51.0", "2000000"),
    row("htg w4p", 0, "41.0", "1100000"),
    row("nearest w8", 0, "48.0", "2200000"),
    row("on the fly w8", 0, "43.0", "2100000", model="demo:digits-flow"),
]


def test_every_case_can_be_converted():
    for model in MODELS:
        for name, chosen in cases_of(model).items():
            assert (
                name.removeprefix(HIDDEN) == AUTO + chosen
                if isinstance(chosen, str)
                else Recipe(**chosen)
            )
    assert {*SINGLE, "linear"} == set(METHOD_NAMES)
    assert set(DITS) | set(FLOWS) == set(MODELS)


def test_what_judges_was_not_optimized_on():
    assert not set(CALIBRATED) & set(JUDGED)


@torch.no_grad()
def test_hidden_classes_are_in_no_tensor_and_come_back_as_bf16():
    model = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=2, sample_size=4,
        norm_num_groups=1, num_embeds_ada_norm=10,
    )  # fmt: skip
    tables = [
        block.norm1.emb.class_embedder.embedding_table.weight for block in model.transformer_blocks
    ]
    tables[1].copy_(tables[0])
    before = tables[0].clone()
    were = hide(model, JUDGED, CALIBRATED[0])
    for table in tables:
        assert torch.equal(table[list(JUDGED)], before[:1].expand(len(JUDGED), -1))
        assert torch.equal(table[list(CALIBRATED)], before[list(CALIBRATED)])
    reveal(model, JUDGED, were)
    for table in tables:
        assert torch.equal(table[list(JUDGED)], before[list(JUDGED)].bfloat16().float())
        assert torch.equal(table[[*CALIBRATED, 10]], before[[*CALIBRATED, 10]])


def test_means_and_spread_by_hand(tmp_path):
    found = means(ROWS)
    assert [(f["case"], f["repeats"]) for f in found] == [
        ("auto smallest", 2), ("auto largest", 1), ("htg w4p", 1), ("nearest w8", 1), ("on the fly w8", 1),
    ]  # fmt: skip
    first = found[0]
    assert (first["sqnr_guided_db"], first["bytes"]) == ("43.50", "1000000")
    assert (first["least_guided_db"], first["most_guided_db"]) == ("43.00", "44.00")
    assert first["commits"] == "abc def"
    assert first["sqnr_free_db"] == ""
    write_means(tmp_path / "mean.csv", ROWS)
    assert tuple(read_rows(tmp_path / "mean.csv")[0]) == FIELDS


def test_the_picture_has_a_panel_per_model(tmp_path):
    draw(tmp_path / "one.png", means(ROWS), ["demo:digits"])
    draw(tmp_path / "two.png", means(ROWS), ["demo:digits", "demo:digits-flow"])
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.width == 2 * one.width
        assert len(one.convert("RGB").getcolors(100_000)) > 20


def test_the_front_page_takes_means_of_one_model(tmp_path):
    (tmp_path / "auto.csv").write_text(
        "model,case,bytes,sqnr_forced_db\n"
        "demo:digits,auto largest,3000000,50.0\n"
        "demo:digits,auto smallest,1000000,40.0\n"
        "demo:digits,auto smallest,2000000,43.0\n"
        "demo:digits-flow,auto smallest,1000,1.0\n"
    )
    found = places(tmp_path / "auto.csv", "demo:digits")
    assert list(found.items()) == [("auto smallest", (1.5, 41.5)), ("auto largest", (3.0, 50.0))]


class Call:
    """Whatever model it is replayed on, this comes out."""

    def __init__(self, value):
        self.value = value

    def replay(self, model):
        return self.value


@pytest.mark.parametrize("in_turn", [False, True])
def test_guidance_by_hand(in_turn):
    """Both halves are 1; quantized 1.1 and 0.9, 20 dB each. Guided 0.9 + 1.5 * 0.2 = 1.2: 10 log10(1 / 0.04)."""
    float_half, cond, null = torch.ones(1, 4), torch.full((1, 4), 1.1), torch.full((1, 4), 0.9)
    both = Recorded(Call(torch.cat([cond, null])), torch.cat([float_half] * 2))
    apart = [Recorded(Call(cond), float_half), Recorded(Call(null), float_half)]
    guided, forced = forced_db([apart if in_turn else [both]], None, in_turn)
    assert guided == pytest.approx(10 * math.log10(1 / 0.04), abs=1e-4)  # fp32
    assert forced == pytest.approx(20, abs=1e-4)

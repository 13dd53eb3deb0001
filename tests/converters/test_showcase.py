"""`ditq demo`: a folder a person can look at, complete, offline, and repeatable."""

import json
import math
import re

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from ditq_bench.browser import MISSING, faults, find_browser
from ditq_converters.showcase import Settings, run_showcase

TINY = Settings(
    steps=3,
    calibration_samples=4,
    scored_samples=10,
    salient_samples=2,
    few_samples=2,
    flow_samples=4,
    flow_salient_samples=2,
    flow_calibration_samples=4,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run_showcase(out, TINY)


def test_every_file_the_page_shows_exists(made):
    out, _ = made
    page = (out / "index.html").read_text()
    shown = set(re.findall(r"""(?:src|href)=["']([^"']+)["']""", page))
    assert len(shown) >= 10
    assert [name for name in sorted(shown) if not (out / name).is_file()] == []


def test_every_picture_is_shown(made):
    out, _ = made
    page = (out / "index.html").read_text()
    assert [path.name for path in out.glob("*.png") if path.name not in page] == []


@pytest.mark.skipif(find_browser() is None, reason=MISSING)
def test_the_page_fits_a_phone_and_a_screen(made):
    assert faults(made[0] / "index.html", find_browser()) == []


def test_the_page_says_what_was_made_how_and_when(made):
    page = (made[0] / "index.html").read_text()
    for told in ("demo:digits, demo:digits-flow", "3 steps, guidance 1.5", "UTC", "torch 2."):
        assert told in page
    assert "{&#x27;" not in page  # no Python dict


def test_categories_of_sizes_compare(made):
    """The float model's bytes stand under the categories that its packed twins have."""
    sizes = made[1]["digits"]["bytes"]
    for category in ("block weights", "modulation weights"):
        assert sizes["float"][category] == 4 * sizes["W8A8"][category]  # fp32 against int8


def test_the_page_needs_no_network(made):
    page = (made[0] / "index.html").read_text()
    assert not re.search(r"https?://|//cdn|@import|<script|<link", page)
    assert page.startswith("<!doctype html>")


def test_pictures_are_pictures(made):
    for path in made[0].glob("*.png"):
        with Image.open(path) as image:
            image.load()
            low, high = image.convert("L").getextrema()
            assert high - low > 50, path.name
            assert min(image.size) >= 32, path.name


def test_the_report_parses_and_is_complete(made):
    out, report = made
    stored = json.loads((out / "report.json").read_text())
    assert stored == json.loads(json.dumps(report))
    assert stored["settings"]["steps"] == 3
    studies = {"digits", "salient", "flow", "flow_salient"}
    assert {"checks", "seconds", "settings", "versions"} | studies == set(stored)
    assert {"ditq", "torch", "diffusers", "python", "machine"} == set(stored["versions"])
    assert set(stored["digits"]["variants"]) == {"W8A8", "W4A8"}
    assert set(stored["salient"]["variants"]) == {
        f"{bits} {activations} {method}"
        for bits in ("W8A8", "W4A8")
        for activations in ("static", "token")
        for method in ("linear", "smoothquant")
    }
    for name in ("flow", "flow_salient"):
        assert set(stored[name]["variants"]) == {"W8A8", "W4A8 data-free", "W4A8 gptq"}
    for study in (stored[name] for name in sorted(studies)):
        assert {"accuracy", "mean_probability", "digit_fd"} <= set(study["float"])
        for name, variant in study["variants"].items():
            for curve in ("sqnr_free", "sqnr_forced"):
                assert len(variant[curve]["mean_of_ratios_db"]) == 3
                assert math.isfinite(variant[curve]["mean_db"])
            assert 0 <= variant["accuracy"] <= 1
            assert math.isfinite(variant["psnr_db"])
            assert sum(study["bytes"][name].values()) == variant["bytes_on_disk"]
            # 6 blocks x 6 linears; a Flux has 12 in each of 2 joint blocks, and 5 in each of 4 single ones
            linears = 36 if "flow" not in study["model"] else 2 * 12 + 4 * 5
            assert variant["execution"]["totals"]["integer_linears"] == linears
            assert variant["recipe"]["weights"] == {"W8": "w8", "W4": "w4p"}[name[:2]]


def test_checks_say_what_was_measured(made):
    checks = made[1]["checks"]
    assert len(checks) == 13
    for check in checks:
        assert check["ok"] == (check["value"] >= check["at_least"])
    # at three steps too: 47 dB, 9 dB over data-free, 34 dB where channels are planted
    flow = [check for check in checks if check["what"].startswith("flow")]
    assert len(flow) == 5
    assert all(check["ok"] for check in flow)


def test_the_models_it_left_load(made):
    out, report = made
    for folder in ("digits/w8a8", "digits/w4a8", "salient"):
        path = out / folder if folder != "salient" else next(out.glob("digits-salient/w4a8-*"))
        pipe = DiffusionPipeline.from_pretrained(path)
        assert pipe.get_label_ids(["three"]) == [3]
    flow = json.loads((out / "digits-flow" / "w4a8-gptq" / "ditq" / "call.json").read_text())
    assert (flow["height"], flow["true_cfg_scale"]) == (32, 1.5)
    sizes = report["digits"]["bytes"]
    totals = {name: sum(parts.values()) for name, parts in sizes.items()}
    assert totals["W4A8"] < totals["W8A8"] < totals["float"]


def test_it_can_be_run_again_with_other_settings(made):
    """`ditq demo --quick` and then `ditq demo` write to the same default folder."""
    out, before = made
    again = run_showcase(out, Settings(2, 1.5, 2, 4, 2, 1, 2, 2, 2))
    assert again["settings"]["steps"] == 2
    assert len(again["digits"]["variants"]["W8A8"]["sqnr_free"]["mean_of_ratios_db"]) == 2
    assert before["settings"]["steps"] == 3
    assert json.loads((out / "report.json").read_text())["settings"]["steps"] == 2

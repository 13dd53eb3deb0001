"""The bench prints no time for a wrong answer, compares within one run, and says where it measured."""

import csv
import json
import time

import pytest
import torch
import typer
from typer.testing import CliRunner

import ditq_kernels as k
from ditq_bench import SHAPES, GemmShape, ceilings
from ditq_bench.browser import faults, find_browser
from ditq_bench.cli import bench
from ditq_bench.gemm import BASELINE, bench_gemm
from ditq_bench.measure import Row
from ditq_bench.results import FIELDS, backend_of, commit, doubts
from ditq_bench.timing import ROUND, Timing, time_in_turn
from ditq_runtime.version import __version__

SMALL = GemmShape("small", 8, 128, 32)
CPU = torch.device("cpu")


def test_operations_of_a_known_shape():
    fc1 = next(shape for shape in SHAPES["dit-xl-256"] if shape.name.endswith("fc1"))
    assert (fc1.tokens, fc1.inputs, fc1.outputs) == (512, 1152, 4608)
    assert fc1.operations == 2 * 512 * 1152 * 4608


def test_candidates_run_in_turn_after_a_warm_up():
    order = []

    def runs(name):
        return lambda: (time.sleep(2 * ROUND), order.append(name))

    timings = time_in_turn({"a": runs("a"), "b": runs("b")}, CPU, rounds=4)
    assert order == ["a", "a", "b", "b", *["a", "b"] * 4]  # called, and timed to see how long it is
    assert timings["a"].rounds == 4
    assert timings["a"].how == "clock"
    assert 2 * ROUND <= timings["a"].p20 <= timings["a"].median <= timings["a"].p80


def test_a_short_candidate_fills_a_round():
    calls, ticks = [], iter(range(10**6))

    def clock():
        return next(ticks) * 30e-6  # a call, or a round, seems to take 30 us

    timing = time_in_turn({"a": lambda: calls.append(1)}, CPU, rounds=5, clock=clock)["a"]
    count = round(ROUND / 30e-6)
    assert len(calls) == 2 + 5 * count
    assert timing.median == pytest.approx(30e-6 / count)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_kernels_are_replayed_and_what_waits_for_the_gpu_is_not():
    a = torch.randn(256, 256, device="cuda")
    calls = {"product": lambda: a @ a, "waits": lambda: (a @ a).sum().item()}
    timings = time_in_turn(calls, torch.device("cuda"), rounds=3, graphs=True)
    assert {name: t.how for name, t in timings.items()} == {"product": "graph", "waits": "events"}


def test_a_spent_budget_still_gives_three_rounds():
    assert time_in_turn({"a": lambda: None}, CPU, rounds=100, budget=0.0)["a"].rounds == 3


def test_ratios_are_of_the_same_run():
    rows = {row.candidate: row for row in bench_gemm(SMALL, CPU, budget=0.0)}
    assert rows[BASELINE].speedup == 1.0
    for row in rows.values():
        assert row.speedup == pytest.approx(rows[BASELINE].timing.median / row.timing.median)
        assert row.tops == pytest.approx(SMALL.operations / row.timing.median / 1e12)
    assert rows["ditq W8A8"].error < 1e-6


@pytest.mark.parametrize("op", ["gemm_w8a8", "gemm_w4a8", "gemm_w4a8_per_group"])
def test_a_wrong_kernel_gets_no_time(op, monkeypatch):
    right = getattr(k, op)
    monkeypatch.setattr(k, op, lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    with pytest.raises(RuntimeError, match=r"is wrong .* no time is reported"):
        bench_gemm(SMALL, CPU, budget=0.0)


@pytest.fixture
def app():
    app = typer.Typer()
    app.add_typer(bench, name="bench")
    return app


def test_the_command_writes_rows_with_their_origin(app, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "small", (SMALL,))
    arguments = ["bench", "kernels", "--shapes", "small", "--budget", "0.01", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["backend"] == k.backend_of("gemm_w8a8", "cpu")
    with (tmp_path / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(FIELDS)
    assert {row["candidate"] for row in rows} == {row["candidate"] for row in report["rows"]}
    assert all(row["device"] and row["torch"] == torch.__version__ for row in rows)
    assert {(row["ditq"], row["commit"]) for row in rows} == {(__version__, commit())}
    assert all(f"{torch.get_num_threads()} thread" in row["device"] for row in rows)
    page = (tmp_path / "kernels.html").read_text()
    assert 'src="speedup.png"' in page
    assert all(row["candidate"] in page for row in rows)
    browser = find_browser()
    assert browser is None or faults(tmp_path / "kernels.html", browser) == []
    gemm = k.backend_of("gemm_w8a8", "cpu")
    assert {row["backend"] for row in rows} == {"torch", "reference", gemm}  # quantizers: reference


def test_unknown_shapes_are_misuse(app, tmp_path):
    arguments = ["bench", "kernels", "--shapes", "huge", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "dit-xl-256" in result.output
    assert not (tmp_path / "out").exists()


def test_rows_name_the_backend_of_their_own_op(processor):
    processor(avx_vnni=True)
    names = {
        "torch bf16 linear": "torch",
        "torch._int_mm": "torch",
        "ditq W8A8": "cpu",
        "ditq W4A8, GEMM alone": "cpu",
        "ditq W4A8 per group, GEMM alone": "cpu",
        "ditq quantize per token": "reference",
        "ditq int8 QK, int8 PV": "reference",
    }
    assert {name: backend_of(name, CPU) for name in names} == names


@pytest.mark.parametrize("vnni", [True, False])
def test_the_roof_of_int8_is_an_exact_product(processor, vnni):
    processor(avx_vnni=vnni)
    codes = torch.randint(-64, 65, (24, 24), dtype=torch.int8)
    total = ceilings._int8_product(codes)()
    assert torch.equal(total.long(), codes.long() @ codes.long().t())


def test_rows_to_doubt_are_named():
    def row(p20, p80, roof):
        return Row("w8", Timing(p20, 1.0, p80, 9), 1.0, 1.0, 1.0, 1, roof, 0.0, True)

    assert doubts([(SMALL, row(0.95, 1.1, 0.9))]) == []
    assert "rounds differ by 50 %" in doubts([(SMALL, row(0.9, 1.4, 0.9))])[0]
    assert "104 % of the roof" in doubts([(SMALL, row(1.0, 1.0, 1.04))])[0]
    many = doubts([(SMALL, row(0.9, 1.4, 0.9))] * 9)
    assert len(many) == 4
    assert many[-1].startswith("6 more rows like these, the worst rounds differ by 50 %")
    assert "130 % of the roof" in doubts([(SMALL, row(1.0, 1.0, 1.3))])[0]
    assert doubts([(SMALL, row(1.0, 1.0, None))]) == []

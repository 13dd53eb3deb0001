"""Questions that only a GPU can answer, each a comparison of launches: `python -m ditq_bench.gpu_run.questions`.

Every launch is checked against the default one before it is timed. A dry run takes tiny shapes through the Triton
interpreter: its times mean nothing, its checks do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ditq_bench.ceilings import measure_ceilings
from ditq_bench.results import origin_of
from ditq_bench.timing import time_in_turn
from ditq_bench.tune.run import PROBLEMS, time_launches
from ditq_bench.tune.space import Bucket
from ditq_kernels import tuning
from ditq_runtime.files import atomic_file

BUDGET = 6.0  # seconds a comparison
Answer = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where questions are asked, and how large their shapes are."""

    device: torch.device
    dry_run: bool

    def bucket(
        self, op: str, num_tokens: int, in_features: int, out_features: int = 4608
    ) -> Bucket:
        """A problem of a DiT, or a tiny one of the same kind; with the launch that would be used."""
        attention = op.startswith("attention")
        if self.dry_run:
            num_tokens, out_features = 32, 32
            in_features = in_features if attention else 128
        default = _lookup(op)(op, tuning.tables_of(self.device), num_tokens, in_features)
        heads = 1 if self.dry_run else 32
        return Bucket(op, {}, num_tokens, in_features, default, out_features, heads)


def ceilings(place: Place) -> Iterator[Answer]:
    """What the machine reaches at best: a copy, square products."""
    found = measure_ceilings(place.device, budget=1.0 if place.dry_run else 10.0)
    yield {"case": "copy", "bytes_per_second": found.bandwidth}
    for kind, rate in found.rates.items():
        yield {"case": kind, "operations_per_second": rate}


def tile_depth(place: Place) -> Iterator[Answer]:
    """W8A8: how much does each look at the tensor cores' result cost? Deeper tiles look less often."""
    tiles = [
        (128, 128, 64, 4, 4),
        (128, 128, 128, 4, 3),
        (128, 256, 64, 8, 3),
        (128, 256, 128, 8, 3),
    ]
    if place.dry_run:
        tiles = [(32, 32, 64, 4, 2), (32, 32, 128, 4, 2)]
    for inputs, outputs in ((1152, 4608), (4608, 1152)):
        bucket = place.bucket("gemm_w8a8", 8192, inputs, outputs)
        yield from _compare(place, bucket, [tuning.TileConfig(*tile) for tile in tiles])


def four_bits(place: Place) -> Iterator[Answer]:
    """W4A8 beside W8A8, where compute binds and where weights do."""
    for tokens in (16, 512, 8192):
        for op in ("gemm_w8a8", "gemm_w4a8"):
            yield from _compare(place, place.bucket(op, tokens, 1152), [])


def values(place: Place) -> Iterator[Answer]:
    """Attention: int8 or bf16 values?"""
    for head_dim in (72, 128):
        for keys in (256, 1024, 4096):
            if place.dry_run and keys > 256:
                continue
            for op in ("attention_qk_int8_pv_int8", "attention_qk_int8_pv_bf16"):
                yield from _compare(place, place.bucket(op, keys, head_dim), [])


def rows(place: Place) -> Iterator[Answer]:
    """Quantizers: rows per program and warps, against the copy above."""
    launches = [tuning.RowConfig(r, w) for r, w in ((1, 4), (2, 4), (4, 4), (4, 8), (8, 8))]
    for op in ("quantize_per_token", "quantize_static"):
        yield from _compare(
            place, place.bucket(op, 32768, 1152), launches[: 1 if place.dry_run else None]
        )


def graph(place: Place) -> Iterator[Answer]:
    """One block's GEMMs and quantizers at two images: launched from Python, and replayed from a CUDA graph."""
    shapes = ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152))
    buckets = [place.bucket("gemm_w8a8", 1024, inputs, outputs) for inputs, outputs in shapes]
    buckets += [place.bucket("quantize_per_token", 1024, inputs) for inputs, _ in shapes]
    calls = [(PROBLEMS[b.op](b, place.device), b.default) for b in buckets]

    def block() -> None:
        for run, config in calls:
            run(config)

    candidates: dict[str, Callable[[], object]] = {"launched": block}
    if place.device.type == "cuda":
        block()
        replayed = torch.cuda.CUDAGraph()
        with torch.cuda.graph(replayed):
            block()
        candidates["replayed"] = replayed.replay
    for name, t in time_in_turn(candidates, place.device, budget=BUDGET, rounds=30).items():
        yield {
            "case": name,
            "p20_us": 1e6 * t.p20,
            "median_us": 1e6 * t.median,
            "p80_us": 1e6 * t.p80,
        }


def _lookup(op: str) -> Callable[..., Any]:
    for prefix, find in (("quantize", tuning.row_config), ("attention", tuning.attention_config)):
        if op.startswith(prefix):
            return find
    return tuning.tile_config


QUESTIONS: dict[str, Callable[[Place], Iterator[Answer]]] = {
    "ceilings": ceilings,
    "tile_depth": tile_depth,
    "four_bits": four_bits,
    "values": values,
    "rows": rows,
    "graph": graph,
}


def _compare(place: Place, bucket: Bucket, configs: list[Any]) -> Iterator[Answer]:
    others = [config for config in configs if config != bucket.default]
    budget = 0.0 if place.dry_run else BUDGET
    for timed in time_launches(bucket, [bucket.default, *others], place.device, budget):
        case = f"{bucket.op} {bucket.num_tokens} x {bucket.in_features}"
        launch = ", ".join(f"{name} {value}" for name, value in vars(timed.config).items())
        yield {
            "case": case, "out_features": bucket.out_features, "launch": launch,
            "default": timed.config == bucket.default, "p20_us": 1e6 * timed.p20,
            "median_us": 1e6 * timed.median, "p80_us": 1e6 * timed.p80,
        }  # fmt: skip


def ask(place: Place, names: list[str], budget: float) -> dict[str, Any]:
    """All answers, JSON-safe; a question that fails says so and does not stop the others."""
    report: dict[str, Any] = {"origin": origin_of(place.device), "dry_run": place.dry_run}
    answers: dict[str, Any] = {}
    end = time.perf_counter() + budget
    for name in names:
        if time.perf_counter() > end:
            answers[name] = {"question": QUESTIONS[name].__doc__, "error": "no time left"}
            continue
        answers[name] = {"question": QUESTIONS[name].__doc__, "answers": [], "error": ""}
        try:
            for answer in QUESTIONS[name](place):
                answers[name]["answers"].append(answer)
        except (RuntimeError, NotImplementedError) as error:
            answers[name]["error"] = " ".join(str(error).split())[:300]
    return report | {"questions": answers}


def main() -> None:
    """Ask, and write questions.json. Exit code 1 if a question failed."""
    parser = argparse.ArgumentParser(description="ask a GPU what only a GPU can answer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(QUESTIONS))
    parser.add_argument("--budget", type=float, default=120.0)
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, interpreted on the CPU"
    )
    args = parser.parse_args()
    place = Place(torch.device("cpu" if args.dry_run else "cuda"), args.dry_run)
    report = ask(place, args.only.split(","), args.budget)
    with atomic_file(args.out / "questions.json") as part:
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if any(question["error"] for question in report["questions"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

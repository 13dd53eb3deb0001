"""Questions that only a GPU can answer, each a comparison of launches: `python -m ditq_bench.gpu_run.questions`.

Every launch is checked against the default one before it is timed: a wrong one is left out. A dry run takes tiny shapes
through the Triton interpreter: its times mean nothing, its checks do. A rehearsal takes them through Triton's compiler
and launcher, over a driver that does nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ditq_bench.attention import bench_attention
from ditq_bench.ceilings import measure_ceilings
from ditq_bench.gpu_run.place import BUDGET, Answer, Place, compare, times_of
from ditq_bench.results import origin_of
from ditq_bench.shapes import AttentionShape
from ditq_bench.tune.problems import PROBLEMS, unswapped
from ditq_bench.tune.space import BY_TMA, STAYING, UNFLATTENED
from ditq_kernels.launch import tuning
from ditq_runtime.files import atomic_file


def ceilings(place: Place) -> Iterator[Answer]:
    """What the machine reaches at best: a copy, square products."""
    found = measure_ceilings(place.device, budget=1.0 if place.dry_run else 10.0)
    yield {"case": "copy", "bytes_per_second": found.bandwidth}
    for kind, rate in found.rates.items():
        yield {"case": kind, "operations_per_second": rate}


def four_bits(place: Place) -> Iterator[Answer]:
    """W4A8 beside W8A8, where compute binds and where weights do."""
    for tokens in (16, 512, 8192):
        for op in ("gemm_w8a8", "gemm_w4a8"):
            yield from compare(place, place.bucket(op, tokens, 1152), [])


def values(place: Place) -> Iterator[Answer]:
    """Attention: int8 or bf16 values?"""
    for head_dim in (72, 128):
        for keys in (256, 1024, 4096):
            if place.dry_run and keys > 256:
                continue
            for op in ("attention_qk_int8_pv_int8", "attention_qk_int8_pv_bf16"):
                yield from compare(place, place.bucket(op, keys, head_dim), [])


def sdpa(place: Place) -> Iterator[Answer]:
    """Quantized attention against torch's own, and what else is installed."""
    for head_dim in (72, 128):
        for keys in (256, 1024, 4096):
            if place.dry_run and (keys > 256 or head_dim > 72):
                continue
            sequences, heads = (1, 1) if place.dry_run else (2, 16)
            shape = AttentionShape(
                f"{keys} x {head_dim}", sequences, heads, 32 if place.dry_run else keys, head_dim
            )
            for row in bench_attention(
                shape, place.device, 0.0 if place.dry_run else place.seconds / 2
            ):
                times = {"p20_us": 1e6 * row.timing.p20, "median_us": 1e6 * row.timing.median}
                yield {"case": f"{shape.name}, {row.candidate}", **times}


def rows(place: Place) -> Iterator[Answer]:
    """Quantizers: rows per program and warps, against the copy above."""
    launches = [tuning.RowConfig(r, w) for r, w in ((1, 4), (2, 4), (4, 4), (4, 8), (8, 8))]
    for op in ("quantize_per_token", "quantize_static"):
        yield from compare(
            place, place.bucket(op, 32768, 1152), launches[: 1 if place.dry_run else None]
        )


def graph(place: Place) -> Iterator[Answer]:
    """The seven launches of a DiT-XL/2 block at one guided image: from Python, and replayed from a CUDA graph."""
    buckets = [
        place.bucket("adaln_quantize", 512, 1152),
        place.bucket("gemm_w8a8", 512, 1152, 3456),
        place.bucket("attention_qk_int8_pv_int8", 256, 72),
        place.bucket("gemm_w8a8_epilogue", 512, 1152, 1152),
        place.bucket("adaln_quantize", 512, 1152),
        place.bucket("gemm_w8a8_epilogue", 512, 1152, 4608),
        place.bucket("gemm_w8a8_epilogue", 512, 4608, 1152),
    ]
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
    yield from times_of(place, candidates, graphs=False)


def variants(place: Place) -> Iterator[Answer]:
    """W8A8 by pointers, TMA, programs that stay (one loop or two), specialized warps, 64 to 256 inputs at once?"""
    shallow = [(128, 128, 64, 4, 4), (128, 256, 64, 8, 3)]
    tiles = [(128, 128, 128, 4, 3), (128, 256, 128, 8, 3), (128, 128, 256, 8, 2)]
    shapes = [(8192, 1152, 4608), (8192, 4608, 1152), (4096, 4096, 4096)]
    if place.dry_run:
        shallow, shapes = [], shapes[:1]
        tiles = tiles[:1] if place.rehearsal else [(16, 16, 64, 4, 2)]
    plain = [tuning.TileConfig(*tile) for tile in tiles]
    fields = [*STAYING[:1], *((*UNFLATTENED[:1], *BY_TMA) if place.hopper else ())]
    launches = [*plain, *(tuning.TileConfig(*tile) for tile in shallow)]
    launches += [dataclasses.replace(tile, **field) for tile in plain for field in fields]
    for shape in shapes:
        yield from compare(place, place.bucket("gemm_w8a8", *shape), launches)


def split(place: Place) -> Iterator[Answer]:
    """How many programs should share a tile? fc2 and the attention's projection of DiT-XL/2 at 1 to 4 guided images."""
    for op in ("gemm_w8a8_epilogue", "gemm_w4a8_epilogue"):
        for tokens in (512, 2048):
            for inputs in (4608, 1152):
                bucket = place.bucket(op, tokens, inputs, 1152)
                counts = [
                    dataclasses.replace(bucket.default, split_k=count) for count in (1, 2, 3, 4)
                ]
                yield from compare(place, bucket, counts)
                if place.dry_run:
                    return


def parts(place: Place) -> Iterator[Answer]:
    """Stages behind a GEMM: a whole tile, or in parts, so that registers leave room for a second program?"""
    for op in ("gemm_w8a8_epilogue", "gemm_w4a8_epilogue"):
        for outputs in (1152, 4608):
            bucket = place.bucket(op, 8192, 1152, outputs)
            launches = [dataclasses.replace(bucket.default, parts=count) for count in (1, 2, 4)]
            yield from compare(place, bucket, launches)
            if place.dry_run:
                return


def unpack(place: Place) -> Iterator[Answer]:
    """W4A8: weights as first operand, expanded four at once in assembly? Or in plain Triton, second, or ahead?"""
    bucket = place.bucket("gemm_w4a8", 8192, 1152)
    w8 = place.bucket("gemm_w8a8", 8192, 1152)
    expand = place.bucket("w4_expand", 8192, 1152)
    second = unswapped(bucket, place.device)
    runs = {b.op: PROBLEMS[b.op](b, place.device) for b in (bucket, w8, expand)}

    def plain() -> None:
        with mock.patch.object(gemm_w4a8(), "INTERPRETED", True):
            runs["gemm_w4a8"](bucket.default)

    def expanded() -> None:
        runs["w4_expand"](expand.default)
        runs["gemm_w8a8"](w8.default)

    yield from times_of(place, {
        "assembly": lambda: runs["gemm_w4a8"](bucket.default),
        "plain Triton": plain,
        "weights second": lambda: second(bucket.default),
        "expanded first": expanded,
    })  # fmt: skip


def gemm_w4a8() -> Any:
    """The kernel's module, which imports Triton."""
    return importlib.import_module("ditq_kernels._triton.gemm_w4a8")


def padded_rows(place: Place) -> Iterator[Answer]:
    """Quantizers of 1152 inputs: two blocks of 1024 and 128, or one of 2048?"""
    for op in ("quantize_static", "adaln_quantize"):
        bucket = place.bucket(op, 32768, 1152)
        run = PROBLEMS[op](bucket, place.device)
        module = importlib.import_module(f"ditq_kernels._triton.{op}")

        def padded(run: Any = run, module: Any = module, launch: Any = bucket.default) -> None:
            with mock.patch.object(module, "row_parts", _one_part):
                run(launch)

        split_row = functools.partial(run, bucket.default)
        yield from times_of(place, {f"{op}, two blocks": split_row, f"{op}, padded": padded})


def _one_part(in_features: int) -> tuple[int, int]:
    return 1 << (in_features - 1).bit_length(), 0


COMPARISONS = 24  # that share a budget, with what compiling takes
QUESTIONS: dict[str, Callable[[Place], Iterator[Answer]]] = {
    "ceilings": ceilings,
    "variants": variants,
    "parts": parts,
    "split": split,
    "four_bits": four_bits,
    "unpack": unpack,
    "values": values,
    "sdpa": sdpa,
    "padded_rows": padded_rows,
    "rows": rows,
    "graph": graph,
}


def ask(
    place: Place,
    names: list[str],
    budget: float,
    done: Callable[[Answer], None] = lambda report: None,
) -> dict[str, Any]:
    """All answers, JSON-safe; a question that fails says so and does not stop the others.

    Args:
        place: where.
        names: in QUESTIONS.
        budget: seconds; what has not begun by then is not asked.
        done: is given the report after every answer, so that a killed run leaves what it has.
    """
    report: dict[str, Any] = {"origin": origin_of(place.device), "dry_run": place.dry_run}
    answers = report["questions"] = {}
    end = time.perf_counter() + budget
    for name in names:
        if time.perf_counter() > end:
            answers[name] = {"question": QUESTIONS[name].__doc__, "error": "no time left"}
            continue
        answers[name] = {"question": QUESTIONS[name].__doc__, "answers": [], "error": ""}
        try:
            for answer in QUESTIONS[name](place):
                answers[name]["answers"].append(answer)
                done(report)
        except Exception as error:  # the compiler has errors of many classes
            answers[name]["error"] = " ".join(str(error).split())[:300]
        done(report)
    done(report)
    return report


def main() -> None:
    """Ask, and write questions.json. Exit code 1 if a question failed."""
    parser = argparse.ArgumentParser(description="ask a GPU what only a GPU can answer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="questions", help="of the file")
    parser.add_argument("--only", default=",".join(QUESTIONS))
    parser.add_argument("--budget", type=float, default=120.0)
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, interpreted on the CPU"
    )
    parser.add_argument(
        "--rehearsal", action="store_true", help="tiny shapes, over a driver that does nothing"
    )
    args = parser.parse_args()
    if args.rehearsal:
        from ditq_kernels._triton.offline import stub

        stub.install(90)
    dry_run = args.dry_run or args.rehearsal
    seconds = min(BUDGET, args.budget / COMPARISONS)
    device = torch.device("cpu" if dry_run else "cuda")
    place = Place(device, dry_run, args.rehearsal, seconds)

    def write(report: Answer) -> None:
        with atomic_file(args.out / f"{args.name}.json") as part:
            part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    report = ask(place, args.only.split(","), args.budget, write)
    if any(question["error"] for question in report["questions"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Every kernel once at a small, off-tile shape, for compute-sanitizer: `python -m ditq_bench.gpu_run.small`."""

from __future__ import annotations

import argparse

import torch

from ditq_bench.gpu_run.questions import Place
from ditq_bench.tune.run import PROBLEMS

TOKENS, INPUTS, HEAD_DIM = 33, 128, 72


def main() -> None:
    """Launch each kernel; prints their names. Exit code 1 if an output is not finite."""
    parser = argparse.ArgumentParser(description="launch every kernel once")
    parser.add_argument("--dry-run", action="store_true", help="interpreted on the CPU")
    dry_run = parser.parse_args().dry_run
    place = Place(torch.device("cpu" if dry_run else "cuda"), dry_run)
    for op in PROBLEMS:
        bucket = place.bucket(op, TOKENS, HEAD_DIM if op.startswith("attention") else INPUTS, 40)
        out = PROBLEMS[op](bucket, place.device)(bucket.default)
        parts = out if isinstance(out, tuple) else (out,)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise SystemExit(f"{op}: an output is not finite")
        print(op)  # noqa: T201


if __name__ == "__main__":
    main()

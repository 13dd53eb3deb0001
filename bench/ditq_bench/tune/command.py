"""`ditq tune`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

NO_GPU = "tune: needs an NVIDIA GPU and found none; `ditq tune --dry-run --target 90` shows what it would time"


def tune(
    ops: Annotated[str, typer.Option(help="Ops, comma-separated; default: all.")] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Launch table to write; default: the package's, for this GPU."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds of timing.")] = 300.0,
    compile_budget: Annotated[
        float, typer.Option(help="Seconds of compiling; launches not reached are not timed.")
    ] = 240.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be timed; needs no GPU.")
    ] = False,
    target: Annotated[
        int, typer.Option(help="Compute capability of a dry run: 80, 86, 89, 90, 120.")
    ] = 90,
    prune: Annotated[
        bool, typer.Option(help="Compile every launch first and drop the hopeless ones.")
    ] = True,
    slack: Annotated[
        float, typer.Option(min=1.0, help="Drop launches predicted this much slower than the best.")
    ] = 1.5,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time launches of every kernel on this GPU and write its table; nothing is timed at run time.

    Launches that spill, or that a static model rules out, are not timed. Without a table of its own a GPU uses that of
    its architecture, and so it does for ops that the table does not have. A dry run compiles and prunes as a run on the
    GPU does; --no-prune lists launches at once.

    Example: ditq tune --ops gemm_w8a8 --dry-run --target 89
    """
    import torch

    from ditq_bench.tune import run, space
    from ditq_converters.progress import progress_bar
    from ditq_kernels.launch import tuning
    from ditq_runtime.cli.output import print_json, print_table, say

    if not dry_run and not torch.cuda.is_available():
        raise RuntimeError(NO_GPU)
    if not dry_run:
        major, minor = torch.cuda.get_device_capability()
        target = 10 * major + minor
    if target not in space.SHARED_LIMIT:
        raise typer.BadParameter(f"--target: one of {', '.join(map(str, space.SHARED_LIMIT))}.")
    names = [name.strip() for name in ops.split(",")] if ops else list(run.PROBLEMS)
    unknown = [name for name in names if name not in run.PROBLEMS]
    if unknown:
        raise typer.BadParameter(
            f"--ops: unknown {unknown}; choose from {', '.join(run.PROBLEMS)}."
        )
    wanted = space.buckets(target, names)
    total = sum(len(space.launches(bucket, target)) for bucket in wanted)
    pruned: list[tuple[space.Bucket, list[Any]]]
    if prune:
        end = time.perf_counter() + compile_budget
        with progress_bar("pruning", total) as advance:
            pruned = []
            for index, b in enumerate(wanted):
                now = time.perf_counter()
                share = now + (end - now) / (
                    len(wanted) - index
                )  # what one bucket leaves, the next ones have
                pruned.append((b, space.prune(b, target, advance, slack, share)))
    else:
        pruned = [(b, [(config, None) for config in space.launches(b, target)]) for b in wanted]
    for b, kept in pruned:
        kept += [(config, None) for config in space.variants(b, kept[0][0], target)]
    if dry_run:
        rows = [
            (b.op, b.num_tokens, b.in_features, tuning.launch_text(vars(config)),
             "" if predicted is None else 1e6 * predicted)
            for b, kept in pruned
            for config, predicted in kept
        ]  # fmt: skip
        if json:
            print_json({"target": target, "tried": total, "launches": rows})
            return
        columns = ("op", "tokens", "inputs", "launch", "model us")
        print_table(f"sm_{target}: {len(rows)} launches would be timed", columns, rows)
        return
    device = torch.device("cuda", torch.cuda.current_device())
    plan = [(bucket, [config for config, _ in kept]) for bucket, kept in pruned]
    refused: list[str] = []
    with progress_bar("timing", len(plan)) as advance:
        found = []
        for pair in run.tune(plan, device, budget, refused.append):
            found.append(pair)
            advance()
    own = tuning.own_table(device)
    path = out or Path(tuning.__file__).parent / "tuned" / f"{own}.json"
    run.write_table(path, run.table_of(found, f"sm_{target}", torch.cuda.get_device_name(device)))
    best = [
        (b.op, b.num_tokens, b.in_features, tuning.launch_text(vars(t[0].config)), 1e6 * t[0].median,
         next(item.median for item in t if item.config == b.default) / t[0].median)
        for b, t in found
    ]  # fmt: skip
    if json:
        print_json({"table": str(path), "launches": best, "refused": refused})
        return
    print_table(f"{own}", ("op", "tokens", "inputs", "launch", "median us", "x default"), best)
    for reason in refused:
        say(f"refused: {reason}")
    say(f"{path}: {len(found)} of {len(plan)} rows timed")

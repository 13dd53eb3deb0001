"""`ditq tune`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from ditq_bench.chosen import chosen_of

if TYPE_CHECKING:
    from ditq_bench.tune.space import Bucket

# buckets, and launches of each with their predicted seconds, if any
Pruned: TypeAlias = "list[tuple[Bucket, list[tuple[Any, float | None]]]]"

NO_GPU = "tune: needs an NVIDIA GPU and found none; `ditq tune --dry-run --target 90` shows what it would time"


OpsOption = Annotated[str, typer.Option(help="Ops, comma-separated; default: all.")]
OutOption = Annotated[
    Path | None,
    typer.Option(help="Launch table to write; default: the package's, for this GPU."),
]
BudgetOption = Annotated[float, typer.Option(min=0.01, help="Seconds of timing.")]
CompileBudgetOption = Annotated[
    float, typer.Option(min=0, help="Seconds of compiling; launches not reached are not timed.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be timed; needs no GPU.")
]
TargetOption = Annotated[
    int, typer.Option(help="Compute capability of a dry run: 80, 86, 89, 90, 120.")
]
PruneOption = Annotated[
    bool, typer.Option(help="Compile every launch first and drop the hopeless ones.")
]
SlackOption = Annotated[
    float, typer.Option(min=1.0, help="Drop launches predicted this much slower than the best.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def tune(
    ops: OpsOption = "",
    out: OutOption = None,
    budget: BudgetOption = 300.0,
    compile_budget: CompileBudgetOption = 240.0,
    dry_run: DryRunOption = False,
    target: TargetOption = 90,
    prune: PruneOption = True,
    slack: SlackOption = 1.5,
    json: JsonOption = False,
) -> None:
    """Time launches of every kernel on this GPU and write its table; nothing is timed at run time.

    Launches that spill, or that a static model rules out, are not timed. Without a table of its own a GPU uses that of
    its architecture, and so it does for ops that the table does not have. A dry run compiles and prunes as a run on the
    GPU does; --no-prune lists launches at once.

    Example: ditq tune --ops gemm_w8a8 --dry-run --target 89
    """
    import torch

    from ditq_bench.tune import run, space

    if not dry_run and not torch.cuda.is_available():
        raise RuntimeError(NO_GPU)
    if not dry_run:
        major, minor = torch.cuda.get_device_capability()
        target = 10 * major + minor
    if target not in space.SHARED_LIMIT:
        raise typer.BadParameter(f"--target: one of {', '.join(map(str, space.SHARED_LIMIT))}.")
    wanted = space.buckets(target, chosen_of("--ops", ops, tuple(run.PROBLEMS)))
    total = sum(len(space.launches(bucket, target)) for bucket in wanted)
    if prune:
        pruned = _pruned(wanted, target, total, slack, compile_budget)
    else:
        pruned = [(b, [(config, None) for config in space.launches(b, target)]) for b in wanted]
    for b, kept in pruned:
        kept += [(config, None) for config in space.variants(b, kept[0][0], target)]
    if dry_run:
        _tell_launches(pruned, target, total, json)
    else:
        _time_launches(pruned, target, budget, out, json)


def _pruned(wanted: list[Bucket], target: int, total: int, slack: float, seconds: float) -> Pruned:
    """Launches that compile to something hopeful, in so many seconds; what one bucket leaves, the next ones have."""
    from ditq_bench.tune import space
    from ditq_converters.progress import progress_bar

    end, pruned = time.perf_counter() + seconds, []
    with progress_bar("pruning", total) as advance:
        for index, b in enumerate(wanted):
            now = time.perf_counter()
            share = now + (end - now) / (len(wanted) - index)
            pruned.append((b, space.prune(b, target, advance, slack, share)))
    return pruned


def _tell_launches(pruned: Pruned, target: int, total: int, json: bool) -> None:
    """What a run on the GPU would time."""
    from ditq_kernels.launch import tuning
    from ditq_runtime.cli.output import print_json, print_table

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


def _time_launches(
    pruned: Pruned, target: int, budget: float, out: Path | None, json: bool
) -> None:
    """Time them on the current GPU, and write its table."""
    import torch

    from ditq_bench.tune import run
    from ditq_converters.progress import progress_bar
    from ditq_kernels.launch import tuning
    from ditq_runtime.cli.output import print_json, print_table, say

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

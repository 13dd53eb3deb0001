"""Where launches are tried, how large their problems are there, and how they are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ditq_bench.timing import time_in_turn
from ditq_bench.tune.run import same, time_launches
from ditq_bench.tune.space import Bucket
from ditq_kernels.launch import tuning

BUDGET = 6.0  # seconds a comparison
Answer = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where questions are asked, and how large their shapes are.

    Attributes:
        device: of the tensors.
        dry_run: tiny shapes.
        rehearsal: over a driver that does nothing: launches as on a GPU, results hold anything.
        seconds: of timing a comparison.
    """

    device: torch.device
    dry_run: bool
    rehearsal: bool = False
    seconds: float = BUDGET

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

    @property
    def hopper(self) -> bool:
        """TMA and warps that only load: sm_90, or an interpreter, which has the first."""
        on_gpu = self.device.type == "cuda"
        return not on_gpu or torch.cuda.get_device_capability(self.device)[0] == 9


def compare(place: Place, bucket: Bucket, configs: list[Any]) -> Iterator[Answer]:
    """Launches of a problem and its default one, checked against that, the fastest first; and who refused."""
    others = [config for config in configs if config != bucket.default]
    budget = 0.0 if place.dry_run else place.seconds
    launches = [bucket.default, *others]
    refused: list[str] = []
    found = time_launches(
        bucket, launches, place.device, budget, refused.append, differs=refused.append,
        equal=(lambda *_: True) if place.rehearsal else same,
    )  # fmt: skip
    case = f"{bucket.op} {bucket.num_tokens} x {bucket.in_features}"
    for timed in found:
        yield {
            "case": case, "out_features": bucket.out_features,
            "launch": tuning.launch_text(vars(timed.config)),
            "default": timed.config == bucket.default, "p20_us": 1e6 * timed.p20,
            "median_us": 1e6 * timed.median, "p80_us": 1e6 * timed.p80,
        }  # fmt: skip
    for reason in refused:
        yield {"case": case, "out_features": bucket.out_features, "launch": f"refused: {reason}"}


def times_of(
    place: Place, candidates: Mapping[str, Callable[[], object]], graphs: bool = True
) -> Iterator[Answer]:
    """Other calls, each timed in turn; without `graphs` as they are."""
    budget = 0.0 if place.dry_run else place.seconds
    for name, t in time_in_turn(
        candidates, place.device, budget=budget, rounds=30, graphs=graphs
    ).items():
        times = {"p20_us": t.p20, "median_us": t.median, "p80_us": t.p80}
        yield {"case": name} | {unit: 1e6 * seconds for unit, seconds in times.items()}


def _lookup(op: str) -> Callable[..., Any]:
    if op.startswith("attention"):
        return tuning.attention_config
    return tuning.row_config if "quantize" in op or op == "w4_expand" else tuning.tile_config

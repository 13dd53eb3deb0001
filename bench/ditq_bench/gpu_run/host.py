"""What a call of each op costs the host, without diffusers: `python -m ditq_bench.gpu_run.host --out FILE`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ditq_bench.host.cases import calls
from ditq_bench.host.measure import host_costs


def main() -> None:
    """Measure, in small linears of torch on the same core; a line of JSON a call."""
    parser = argparse.ArgumentParser(description="what calls cost the host")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--rehearsal", action="store_true", help="no GPU: a driver that does nothing"
    )
    args = parser.parse_args()
    if args.rehearsal:
        from ditq_kernels._triton.offline import stub

        stub.install(90)
    device = torch.device("cpu" if args.rehearsal else "cuda")
    with args.out.open("w", encoding="utf-8") as file:
        for name, call in calls(device).items():
            (cost,) = host_costs(
                device, {name: call}, lambda: None, rounds=2 if args.rehearsal else 5
            )
            file.write(json.dumps(vars(cost)) + "\n")
            file.flush()


if __name__ == "__main__":
    main()

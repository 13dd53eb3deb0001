"""What the linears and a whole step of DiT-XL/2-256 cost on a CPU: torch in fp32 and bf16 against ours.

    python -m ditq_bench.cpu --out bench/results/cpu.csv

On a machine shared with others, `--clock process` with OMP_NUM_THREADS=1 counts the seconds of this process alone (all
its threads together, hence one). The model is random: real in sizes, meaningless in its output.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel
from torch import nn

import ditq_kernels as k
import ditq_runtime as ditq
from ditq_bench.gemm import candidates
from ditq_bench.measure import measure
from ditq_bench.results import ORIGIN, backend_of, commit, origin_of
from ditq_bench.shapes import SHAPES
from ditq_bench.timing import Timing, time_in_turn
from ditq_bench.xl_model import DIT_XL_2
from ditq_kernels.launch import cpu_features
from ditq_kernels.launch.prepared import copies_kept
from ditq_runtime.files import atomic_file
from ditq_runtime.host.on_the_fly import Choice, choose_formats
from ditq_runtime.host.skeleton import install
from ditq_runtime.layers.linear import QuantLinear

CPU = torch.device("cpu")
COMMIT = commit()  # of the code that was imported, whatever is checked out before the last row
SAMPLES = 2
LINEARS = ("torch fp32 linear", "torch bf16 linear", "torch._int_mm", "ditq W8A8", "ditq W4A8")
PACKED = {"ditq W8A8": "w8", "ditq W4A8": "w4p"}
KEPT = ", copies kept"  # of weights, in a second form that is multiplied faster
SPREAD = 0.5  # of weights, times 1 / sqrt(inputs)
TILE_ROWS = 64  # of normal weights that are packed; a layer repeats them
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
FIELDS = (
    *ORIGIN, "what", "candidate", "backend", "clock", "p20_ms", "median_ms", "p80_ms",
    "rounds", "speedup_over_fp32", "speedup_over_bf16", "weight_bytes",
)  # fmt: skip
Row = dict[str, Any]


def linears(shapes: str, budget: float, clock: str) -> Iterator[Row]:
    """Quantization included, but for `torch._int_mm`, the bare product; results checked against fp64 first."""
    for shape in SHAPES[shapes]:
        chosen = [c for c in candidates(shape, CPU, ("int_mm",)) if c.name in LINEARS]
        for row in measure(chosen, shape.operations, CPU, budget, clock=CLOCKS[clock]):
            speedups = row.speedup, row.speedup_bf16
            name = row.candidate.removesuffix(" linear")
            yield _row(shape.name, name, clock, row.timing, speedups, "")


def steps(config: dict[str, Any], rounds: int, clock: str) -> list[Row]:
    """One forward of a model at each precision, float attention, fused blocks, in turn."""
    models = {
        "torch fp32": _random(config),
        "torch bf16": _random(config).to(torch.bfloat16),
        **{name: _random(config, weights) for name, weights in PACKED.items()},
    }
    runs = {name: _step(model) for name, model in models.items()}
    sizes = {name: _bytes(model) for name, model in models.items()}
    for name in PACKED if cpu_features.int8_gemm() == "pairs" else ("ditq W4A8",):
        runs[name + KEPT] = copies_kept()(runs[name])
        held = k.copied_bytes()
        runs[name + KEPT]()
        sizes[name + KEPT] = sizes[name] + k.copied_bytes() - held
    timings = time_in_turn(runs, CPU, rounds, clock=CLOCKS[clock])
    fp32, bf16, *_ = (timing.median for timing in timings.values())
    what = f"dit-xl-256 step, batch {SAMPLES}"
    return [
        _row(
            what, name, clock, timing, (fp32 / timing.median, bf16 / timing.median),
            sizes[name],
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _random(config: dict[str, Any], weights: str = "") -> Any:
    """A float model, or one in a packed format, with random weights and codes."""
    with init_empty_weights():
        model: Any = DiTTransformer2DModel(**config)
    if weights:
        install(model, choose_formats(model, Choice(weights)), torch.float32)
    model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        _fill(module, generator)
    if weights:
        ditq.configure(model, fuse=True)
    return model


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for _, tensor in own:
        if tensor.is_floating_point():
            inputs = tensor.shape[1] if tensor.dim() > 1 else 1024
            tensor.normal_(std=SPREAD / inputs**0.5, generator=generator)
    if isinstance(module, QuantLinear):
        for name, rows in _packed_tile(module, generator).items():
            values = getattr(module, name).data
            repeats = -(-len(values) // len(rows)), *(1 for _ in rows.shape[1:])
            values.copy_(rows.repeat(repeats)[: len(values)])


def _packed_tile(layer: QuantLinear, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Codes and scales of `TILE_ROWS` rows of normal weights."""
    tile = torch.randn(TILE_ROWS, layer.in_features, generator=generator)
    tile *= SPREAD / layer.in_features**0.5
    if layer.format.weights == "w8":
        w8 = k.quantize_weight_w8(tile)
        return {"weight": w8.qweight, "weight_scale": w8.scale}
    w4 = k.quantize_weight_w4p(tile, layer.in_features // layer.group_scale.shape[1])
    return {
        "weight": w4.packed,
        "weight_scale": w4.scale,
        "group_scale": w4.group_scale,
        "group_offset": w4.group_offset,
    }


def _step(model: Any) -> Callable[[], Any]:
    size, dtype = model.config.sample_size, model.dtype
    latents = torch.randn(
        SAMPLES, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(0)
    ).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    labels, timestep = torch.tensor([3, 7]), torch.tensor([500, 500])

    def run() -> Any:
        with torch.no_grad():
            out = model(latents, timestep=timestep, class_labels=labels).sample
        if not bool(torch.isfinite(out).all()):
            raise RuntimeError("cpu: a step gave values that are not finite; no time is reported")
        return out

    return run


def _row(
    what: str,
    name: str,
    clock: str,
    t: Timing,
    speedups: tuple[float, float],
    weight_bytes: int | str,
) -> Row:
    backend = backend_of(name, CPU)
    times = (f"{1e3 * seconds:.2f}" for seconds in (t.p20, t.median, t.p80))
    ratios = (f"{ratio:.3f}" for ratio in speedups)
    values = (
        *origin_of(CPU)[:-1],
        COMMIT,
        what,
        name,
        backend,
        clock,
        *times,
        t.rounds,
        *ratios,
        weight_bytes,
    )
    return dict(zip(FIELDS, values, strict=True))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/cpu.csv"))
    parser.add_argument(
        "--shapes", choices=tuple(SHAPES), default="dit-xl-256", help="of the linears"
    )
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each linear")
    parser.add_argument("--rounds", type=int, default=3, help="of the whole step; 0: none")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="seconds of what")
    arguments = parser.parse_args()
    rows = list(linears(arguments.shapes, arguments.budget, arguments.clock))
    if arguments.rounds:
        rows += steps(DIT_XL_2, arguments.rounds, arguments.clock)
    with atomic_file(arguments.out) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

"""What this machine reaches at best, measured in the same run: the roof that rows are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ditq_bench.timing import time_in_turn
from ditq_kernels._cpu.product import product
from ditq_kernels.launch import cpu_features

GPU_SIZE, CPU_SIZE = 4096, 512  # of square products
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device.

    Attributes:
        bandwidth: bytes per second of a large copy, reads and writes counted.
        rates: kind of product ("fp32", "bf16", "int8") -> operations per second of a square library product, at
            least those of a wider kind, which could do the work too. Tensor cores multiply int8 at twice the rate of
            bf16; where the library's int8 product does not reach that on CUDA, twice the bf16 rate stands.
    """

    bandwidth: float
    rates: dict[str, float]

    def floor(self, kind: str, operations: int, num_bytes: int) -> float:
        """Seconds that a call needs at these rates (roofline model, Williams et al. 2009)."""
        compute = operations / self.rates[kind] if kind in self.rates else 0.0
        return max(compute, num_bytes / self.bandwidth)


def measure_ceilings(device: torch.device, budget: float = 5.0) -> Ceilings:
    """Time a copy and square products in three types."""
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=device)
    half = a.bfloat16()
    codes = torch.randint(
        -64, 65, (size, size), dtype=torch.int8, device=device
    )  # `_cpu.pairs` copies none
    candidates: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "fp32": lambda: a @ a.t(),
        "bf16": lambda: half @ half.t(),
        "int8": _int8_product(codes),
    }
    share = budget / len(candidates)
    times = {
        name: time_in_turn({name: candidate}, device, budget=share)[name].p20
        for name, candidate in candidates.items()
    }
    rates = {name: 2 * size**3 / seconds for name, seconds in times.items() if name != "copy"}
    rates["bf16"] = max(rates["bf16"], rates["fp32"])
    doubled = 2 if device.type == "cuda" else 1
    rates["int8"] = max(rates["int8"], doubled * rates["bf16"])
    return Ceilings(2 * source.numel() / times["copy"], rates)


def _int8_product(codes: torch.Tensor) -> Callable[[], object]:
    """The fastest product of a square matrix with itself that a library has here."""
    if codes.device.type == "cpu" and cpu_features.int8_gemm():
        return lambda: product(codes, codes)
    return lambda: torch._int_mm(codes, codes.t())

"""A static model of a kernel on an SM: which unit its instructions fill first, and how many programs fit.

Throughput only: clocks that one program needs of each unit, for one hot-loop iteration, or for the whole
kernel where no loop has tensor-core instructions. Latency, bank conflicts and the L2 cache are invisible to
it. It is a model, not a measurement; it ranks configurations of one kernel.

    issue    warp instructions, one per clock and scheduler, four schedulers
    mma      multiplications at the datasheet rate of the tensor cores
    special  MUFU, F2I and I2F, 16 lanes per clock and SM
    memory   shared memory at 128 bytes per clock, the port to L2 at 64; without a loop, device memory
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEDULERS, WARP = 4, 32
SPECIAL_LANES = 16  # a clock and SM
SHARED_BYTES, L2_BYTES = 128, 64  # a clock and SM
REGISTERS, REGISTER_UNIT, SHARED_RESERVED = 65536, 8, 1024
SPECIAL = ("MUFU", "F2I", "I2F")
SHARED_ACCESS, ASYNC_COPY, GLOBAL_ACCESS = (
    ("LDS", "LDSM", "STS", "STSM"),
    ("LDGSTS",),
    ("LDG", "STG"),
)


@dataclass(frozen=True)
class Machine:
    """Limits of an architecture, and the datasheet of the GPU that stands for it.

    Attributes:
        gpu: whose rates these are.
        sms: streaming multiprocessors.
        hertz: boost clock.
        int8: multiplications per clock and SM; None: not known for the instructions the compiler emits.
        bf16: the same, accumulated in fp32.
        shared: bytes of shared memory per SM.
        warps: resident per SM.
        programs: resident per SM.
        bandwidth: of device memory, bytes per second.
    """

    gpu: str
    sms: int
    hertz: float
    int8: int | None
    bf16: int | None
    shared: int
    warps: int
    programs: int
    bandwidth: float

    @property
    def device_bytes(self) -> float:
        """Of device memory, per clock and SM."""
        return self.bandwidth / self.sms / self.hertz


MACHINES = {
    80: Machine("A100", 108, 1.41e9, 2048, 1024, 164 << 10, 64, 32, 2.04e12),
    86: Machine("RTX 3090", 82, 1.70e9, 1024, 256, 100 << 10, 48, 16, 0.94e12),
    89: Machine("RTX 4090", 128, 2.52e9, 1024, 256, 100 << 10, 48, 24, 1.01e12),
    90: Machine("H200", 132, 1.83e9, 4096, 2048, 228 << 10, 64, 32, 4.8e12),
    120: Machine("RTX 5090", 170, 2.41e9, 1024, 256, 100 << 10, 48, 24, 1.79e12),
    100: Machine("B200", 148, 1.85e9, None, None, 228 << 10, 64, 32, 8.0e12),
}
LEGACY_PRODUCT = {"16832": (16, 8, 32), "16816": (16, 8, 16), "1688": (16, 8, 8)}


@dataclass(frozen=True)
class Prediction:
    """What the model says of one kernel.

    Attributes:
        clocks: unit -> clocks that one program fills it; without "mma" where its rate is unknown.
        limiter: the unit with the most.
        programs: resident per SM.
        bound: what keeps more programs out: "registers", "shared", "warps" or "programs".
    """

    clocks: dict[str, float]
    limiter: str
    programs: int
    bound: str

    @property
    def issue_share(self) -> float | None:
        """Issue clocks per tensor-core clock; above about 0.6 they no longer hide behind one another."""
        mma = self.clocks.get("mma")
        return self.clocks["issue"] / mma if mma else None


def predict(census: Mapping[str, Any]) -> Prediction:
    """Apply the model to a census, as `dataclasses.asdict` gives it."""
    machine, warps = MACHINES[census["target"]], census["config"]["num_warps"]
    opcodes = census["loop_opcodes"] or census["whole_opcodes"]
    clocks = {
        "issue": sum(opcodes.values()) * warps / SCHEDULERS,
        "special": _count(opcodes, SPECIAL) * warps * WARP / SPECIAL_LANES,
        "memory": _memory_clocks(opcodes, warps, machine),
    }
    mma = mma_clocks(opcodes, warps, machine)
    if mma is not None:
        clocks["mma"] = mma
    programs, bound = occupancy(census["registers"], census["shared"], warps, machine)
    return Prediction(clocks, max(clocks, key=lambda unit: clocks[unit]), programs, bound)


def mma_clocks(opcodes: Mapping[str, int], warps: int, machine: Machine) -> float | None:
    """Clocks of one program's products; None where their rate is unknown."""
    clocks = 0.0
    for name, count in opcodes.items():
        if "MMA" not in name.split(".")[0]:
            continue
        rate = machine.int8 if "S8" in name else machine.bf16
        if rate is None:
            return None
        clocks += count * _multiplications(name, warps) / rate
    return clocks


def occupancy(registers: int, shared: int, warps: int, machine: Machine) -> tuple[int, str]:
    """Programs resident on an SM, and what keeps more out."""
    per_thread = math.ceil(registers / REGISTER_UNIT) * REGISTER_UNIT
    limits = {
        "registers": REGISTERS // (per_thread * WARP * warps),
        "shared": machine.shared // (shared + SHARED_RESERVED),
        "warps": machine.warps // warps,
        "programs": machine.programs,
    }
    bound = min(limits, key=lambda limit: limits[limit])
    return limits[bound], bound


def _multiplications(name: str, warps: int) -> int:
    """Of one instruction in all warps that execute it: IMMA.16832 is one warp's, IGMMA.64x128x32 four warps'."""
    size = name.split(".")[1]
    if size in LEGACY_PRODUCT:
        return math.prod(LEGACY_PRODUCT[size]) * warps
    return math.prod(map(int, size.split("x"))) * warps // 4


def _memory_clocks(opcodes: Mapping[str, int], warps: int, machine: Machine) -> float:
    shared = _bytes(opcodes, SHARED_ACCESS + ASYNC_COPY) * warps / SHARED_BYTES
    if any("MMA" in name for name in opcodes):
        return max(shared, _bytes(opcodes, ASYNC_COPY + GLOBAL_ACCESS) * warps / L2_BYTES)
    return max(shared, _bytes(opcodes, GLOBAL_ACCESS) * warps / machine.device_bytes)


def _bytes(opcodes: Mapping[str, int], kinds: tuple[str, ...]) -> int:
    """Moved by one warp: LDS.128 and LDSM.4 are 16 bytes a lane, a plain LDS is 4."""
    return sum(
        count * WARP * _width(name)
        for name, count in opcodes.items()
        if name.split(".")[0] in kinds
    )


def _width(name: str) -> int:
    bits = re.search(r"\.(128|64|U16|S16|16|U8|S8)\b", name)
    if name.startswith(("LDSM", "STSM")):
        return 4 * int(name[-1]) if name[-1] in "24" else 4
    return {"128": 16, "64": 8, "8": 1, "16": 2}[bits[1].lstrip("US")] if bits else 4


def _count(opcodes: Mapping[str, int], kinds: tuple[str, ...]) -> int:
    return sum(count for name, count in opcodes.items() if name.split(".")[0] in kinds)

"""Whether to share the inputs of a GEMM's tiles among several programs: a model of whole waves, not a measurement.

A program fills one multiprocessor, and a wave is as many programs as the GPU has multiprocessors. Clocks of a
program are those of its busiest unit in each iteration: the tensor cores, or the port to the L2 cache. Programs that
share a tile leave int32 sums for a second kernel, which adds them up; that launch and its traffic are the price.
"""

import functools
import math
from dataclasses import dataclass

import torch

FEW_TILES = 0.7  # of the multiprocessors; with more tiles nothing is shared
MAX_SPLITS = 4
WORTH = (
    0.9  # of the clocks of one program a tile; a smaller gain is within what the model does not see
)
L2_BYTES = 64  # a clock and multiprocessor
REDUCE_CLOCKS = 3600  # a second launch inside of a replayed graph, about 2 us at 1.8 GHz
INT8_PER_CLOCK = {
    80: 2048,
    86: 1024,
    87: 2048,
    89: 1024,
    90: 4096,
    120: 1024,
    121: 1024,
}  # datasheets, per multiprocessor


@dataclass(frozen=True)
class Gpu:
    """What the model needs to know of a GPU.

    Attributes:
        multiprocessors: how many.
        int8_per_clock: multiplications of one of them.
    """

    multiprocessors: int
    int8_per_clock: int


@dataclass(frozen=True)
class Work:
    """A GEMM [tokens, inputs] x [outputs, inputs]^T in tiles of block_t x block_n, block_k inputs an iteration."""

    tokens: int
    inputs: int
    outputs: int
    block_t: int
    block_n: int
    block_k: int

    @property
    def tiles(self) -> int:
        """Of the result."""
        return math.ceil(self.tokens / self.block_t) * math.ceil(self.outputs / self.block_n)

    @property
    def iterations(self) -> int:
        """Of a program that computes a tile alone."""
        return math.ceil(self.inputs / self.block_k)


def clocks(work: Work, splits: int, gpu: Gpu) -> float:
    """Of the whole GEMM if `splits` programs share each tile."""
    loaded = (work.block_t + work.block_n) * work.block_k / L2_BYTES
    multiplied = work.block_t * work.block_n * work.block_k / gpu.int8_per_clock
    waves = math.ceil(work.tiles * splits / gpu.multiprocessors)
    total = waves * math.ceil(work.iterations / splits) * max(loaded, multiplied)
    if splits > 1:  # each sum is written and read back, 4 bytes
        moved = 8 * splits * work.tokens * work.outputs
        total += REDUCE_CLOCKS + moved / (L2_BYTES * gpu.multiprocessors)
    return total


@functools.lru_cache(maxsize=4096)
def best_splits(work: Work, gpu: Gpu | None) -> int:
    """How many programs share a tile: 1 on an unknown GPU or with enough tiles, else the fastest by the model."""
    if gpu is None or work.tiles >= FEW_TILES * gpu.multiprocessors:
        return 1
    splits = range(1, min(MAX_SPLITS, work.iterations) + 1)
    best = min(splits, key=lambda count: clocks(work, count, gpu))
    return best if clocks(work, best, gpu) <= WORTH * clocks(work, 1, gpu) else 1


@functools.cache
def gpu_of(device: torch.device) -> Gpu | None:
    """What is known of a device, asked once; None for a CPU and for an architecture without a datasheet here."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    rate = INT8_PER_CLOCK.get(10 * found.major + found.minor)
    return None if rate is None else Gpu(found.multi_processor_count, rate)

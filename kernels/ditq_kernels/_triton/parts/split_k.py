"""Several programs share the inputs of a tile: each leaves int32 sums, a second kernel adds them and runs the epilogue.

Integer sums are exact in any order, so the result has the bits of one program that does it all. The sums of all
programs lie side by side, [SPLITS, T, N], and not in one place with atomics: nothing has to be zeroed first.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import run_kernel
from ditq_kernels._triton.parts.epilogue import Epilogue, write_tile
from ditq_kernels.launch import tuning, waves

BLOCK_T, BLOCK_N, NUM_WARPS = 16, 64, 4  # BLOCK_T divides the tiles of every GEMM, see Bias.one_sample


@triton.jit
def inputs_of_program(K, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr):
    """First input of this program and the end of its inputs; whole iterations, none if too many share."""
    each = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    first = tl.program_id(1) * each
    return first, tl.minimum(first + each, K)


@triton.jit
def write_sums(total, tile_t, tile_n, T, N, sums_ptr, T_AXIS: tl.constexpr):
    """Store a tile of sums, [T, N] (T_AXIS 0) or [N, T] (1), in this program's part of sums [SPLITS, T, N]."""
    N_AXIS: tl.constexpr = 1 - T_AXIS
    first_t, first_n = tile_t * total.shape[T_AXIS], tile_n * total.shape[N_AXIS]
    t, n = tl.arange(0, total.shape[T_AXIS]), tl.arange(0, total.shape[N_AXIS])
    # int64: SPLITS * T * N may pass 2**31; a tile does not, and int32 inside of it saves the registers that would spill
    at = sums_ptr + (tl.program_id(1).to(tl.int64) * T + first_t) * N + first_n
    inside = tl.expand_dims(t < T - first_t, N_AXIS) & tl.expand_dims(n < N - first_n, T_AXIS)
    tl.store(at + (tl.expand_dims(t * N, N_AXIS) + tl.expand_dims(n, T_AXIS)), total, mask=inside)


@triton.jit
def _split_k_reduce_kernel(
    sums_ptr, out_ptr,  # [SPLITS, T, N] int32, [T, N] float or int8
    epilogue,  # an Epilogue
    T, N, stride_ot,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_t, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (t < T)[:, None] & (n < N)[None, :]
    at = sums_ptr + t.to(tl.int64)[:, None] * N + n[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
    for split in tl.static_range(SPLITS):
        total += tl.load(at + tl.cast(T, tl.int64) * N * split, mask=inside, other=0)
    write_tile(total, tile_t, tile_n, T, N, out_ptr, stride_ot, epilogue, T_AXIS=0)


def splits_of(
    config: tuning.TileConfig, device: torch.device, tokens: int, inputs: int, outputs: int
) -> int:
    """Programs that share a tile; where the launch leaves it open, by the wave model."""
    if isinstance(config.split_k, int):
        return config.split_k
    work = waves.Work(tokens, inputs, outputs, config.block_t, config.block_n, config.block_k)
    return waves.best_splits(work, waves.gpu_of(device))


def run(
    splits: int,
    tiles: int,
    out: torch.Tensor,
    epilogue: Epilogue,
    launch: Callable[[tuple[int, int], torch.Tensor, Any, int], None],
) -> None:
    """Fill `out` [T, N]; `launch` takes a grid, an output, its epilogue and the count of programs that share a tile."""
    if splits == 1:
        launch((tiles, 1), out, epilogue, 1)
        return
    num_tokens, out_features = out.shape
    sums = torch.empty((splits, num_tokens, out_features), dtype=torch.int32, device=out.device)
    launch((tiles, splits), sums[0], None, splits)
    blocks = triton.cdiv(num_tokens, BLOCK_T) * triton.cdiv(out_features, BLOCK_N)
    run_kernel(
        _split_k_reduce_kernel, (blocks,),
        sums, out, epilogue, num_tokens, out_features, out.stride(0),
        SPLITS=splits, BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip

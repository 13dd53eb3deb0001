"""Int8 activations times int8 weights on int8 tensor cores, dequantized in the epilogue.

Both operands are contiguous along K: the other layout costs 2.7x the loop instructions.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ditq_kernels._triton import gemm_w8a8_persistent
from ditq_kernels._triton.parts import split_k
from ditq_kernels._triton.parts.common import GROUP_T, on_device_of, run_kernel, tile_of_program
from ditq_kernels._triton.parts.epilogue import Epilogue, gemm_launch, write_tile
from ditq_kernels._triton.parts.split_k import inputs_of_program, write_sums
from ditq_kernels.launch import tuning


@triton.jit
def sums_w8a8(
    q_ptr, weight_ptr, tile_t, tile_n, T, N, K, stride_qt, stride_wn,
    EVEN_K: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of q @ weight.T, int32 [BLOCK_T, BLOCK_N], or this program's part of the sums."""
    first_t, first_n = tile_t * BLOCK_T, tile_n * BLOCK_N
    k = tl.arange(0, BLOCK_K)
    # rows past the end read the last row instead of needing a mask; they are never stored
    rows = tl.minimum(tl.arange(0, BLOCK_T), T - 1 - first_t) * stride_qt
    columns = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n) * stride_wn
    q_ptr += first_t.to(tl.int64) * stride_qt  # int64: T * K may pass 2**31; a tile does not
    weight_ptr += first_n.to(tl.int64) * stride_wn
    q_at = rows[:, None] + k[None, :]
    weight_at = columns[None, :] + k[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
    first, end = 0, K
    if SPLITS > 1:
        first, end = inputs_of_program(K, BLOCK_K, SPLITS)
        q_ptr += first
        weight_ptr += first
    for start in range(first, end, BLOCK_K):
        if EVEN_K:
            q = tl.load(q_ptr + q_at)
            weight = tl.load(weight_ptr + weight_at)
        else:
            q = tl.load(q_ptr + q_at, mask=(start + k < K)[None, :], other=0)
            weight = tl.load(weight_ptr + weight_at, mask=(start + k < K)[:, None], other=0)
        total = tl.dot(q, weight, total, out_dtype=tl.int32)
        q_ptr += BLOCK_K
        weight_ptr += BLOCK_K
    return total


@triton.jit
def _gemm_w8a8_kernel(
    q_ptr, weight_ptr, out_ptr,  # [T, K] int8, [N, K] int8, [T, N] float; or sums, see split_k
    epilogue,  # an Epilogue, or None: sums are stored as they are
    T, N, K, stride_qt, stride_wn, stride_ot,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    SPLITS: tl.constexpr,  # programs that share a tile
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_T: tl.constexpr,
    PARTS: tl.constexpr,  # of a tile, for the epilogue
):  # fmt: skip
    tile_t, tile_n = tile_of_program(T, N, BLOCK_T, BLOCK_N, GROUP_T)
    total = sums_w8a8(
        q_ptr, weight_ptr, tile_t, tile_n, T, N, K, stride_qt, stride_wn,
        EVEN_K, SPLITS, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SPLITS > 1:
        write_sums(total, tile_t, tile_n, T, N, out_ptr, T_AXIS=0)
    else:
        write_tile(total, tile_t, tile_n, T, N, out_ptr, stride_ot, epilogue, T_AXIS=0, PARTS=PARTS)


def launch(
    q: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
    bias_index: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None,
    config: tuning.TileConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `ops.gemm_w8a8`."""
    out = torch.empty((q.shape[0], weight.shape[0]), dtype=out_dtype, device=q.device)
    if out.numel() == 0:
        return out
    epilogue, config = gemm_launch(
        "gemm_w8a8", q, scale, weight_scale, bias, zero_point, weight_sum, bias_index, lora_x, lora_up,
        config=config,
    )  # fmt: skip
    run(q, weight, out, epilogue, config)
    return out


def run(
    q: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    epilogue: Epilogue,
    config: tuning.TileConfig,
) -> None:
    """Fill `out` with what the epilogue makes of q @ weight.T."""
    (num_tokens, in_features), out_features = q.shape, weight.shape[0]
    tiles = triton.cdiv(num_tokens, config.block_t) * triton.cdiv(out_features, config.block_n)

    def launch_grid(grid: tuple[int, int], to: torch.Tensor, stages: Any, splits: int) -> None:
        run_kernel(
            _gemm_w8a8_kernel, grid,
            q, weight, to, stages,
            num_tokens, out_features, in_features, q.stride(0), weight.stride(0), to.stride(0),
            EVEN_K=in_features % config.block_k == 0, SPLITS=splits,
            BLOCK_T=config.block_t, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            GROUP_T=GROUP_T, PARTS=config.parts,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip

    stays = config.programs_per_sm > 0 or config.loads == "tma"
    with on_device_of(q):
        if stays:
            gemm_w8a8_persistent.run(q, weight, out, epilogue, config)
            return
        splits = split_k.splits_of(config, q.device, num_tokens, in_features, out_features)
        split_k.run(splits, tiles, out, epilogue, launch_grid)

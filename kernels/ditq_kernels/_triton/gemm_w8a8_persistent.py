"""W8A8 by programs that stay: each computes one tile after another, so that the epilogue of one can overlap the next.

The loops over tiles and inputs become one (`flatten`), which lets the compiler load the next tile's inputs during the
epilogue; or some warps only load (`specialize`). With TMA, which Hopper has, a descriptor replaces addresses and masks.
No launch table asks for any of this until a GPU has measured it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ditq_kernels._triton.parts.common import GROUP_T, run_kernel, tile_of
from ditq_kernels._triton.parts.epilogue import Epilogue, write_tile
from ditq_kernels.launch import tuning, waves

TMA_ALIGNMENT = 16  # bytes, of a descriptor's base and of its rows


@triton.jit
def _gemm_w8a8_persistent_kernel(
    q_ptr, weight_ptr, out_ptr,  # [T, K] int8, [N, K] int8 (pointers, or descriptors if TMA), [T, N]
    epilogue,  # an Epilogue
    T, N, K, stride_qt, stride_wn, stride_ot,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    TMA: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,  # the last two exclude each other
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_T: tl.constexpr,
    PARTS: tl.constexpr,  # of a tile, for the epilogue
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T) * tl.cdiv(N, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        tile_t, tile_n = tile_of(tile, T, N, BLOCK_T, BLOCK_N, GROUP_T)
        # rows past the end read the last row instead of needing a mask; they are never stored
        t = tl.minimum(tile_t * BLOCK_T + tl.arange(0, BLOCK_T), T - 1).to(tl.int64)
        n = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        total = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
        for start in range(0, K, BLOCK_K):
            if TMA:  # zeros past the end
                q = q_ptr.load([tile_t * BLOCK_T, start])
                weight = weight_ptr.load([tile_n * BLOCK_N, start]).T
            else:
                q_at = q_ptr + (t * stride_qt)[:, None] + (start + k)[None, :]
                weight_at = weight_ptr + (n * stride_wn)[None, :] + (start + k)[:, None]
                if EVEN_K:
                    q, weight = tl.load(q_at), tl.load(weight_at)
                else:
                    q = tl.load(q_at, mask=(start + k < K)[None, :], other=0)
                    weight = tl.load(weight_at, mask=(start + k < K)[:, None], other=0)
            total = tl.dot(q, weight, total, out_dtype=tl.int32)
        write_tile(total, tile_t, tile_n, T, N, out_ptr, stride_ot, epilogue, T_AXIS=0, PARTS=PARTS)


def run(
    q: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    epilogue: Epilogue,
    config: tuning.TileConfig,
) -> None:
    """As `gemm_w8a8.run`, for a launch with `programs_per_sm` or `loads`; with the tensors' GPU current.

    Raises:
        ValueError: TMA cannot read these tensors.
    """
    (num_tokens, in_features), out_features = q.shape, weight.shape[0]
    tiles = triton.cdiv(num_tokens, config.block_t) * triton.cdiv(out_features, config.block_n)
    operands: tuple[Any, Any] = (q, weight)
    if config.loads == "tma":
        operands = _descriptor(q, config.block_t, config), _descriptor(weight, config.block_n, config)
    run_kernel(
        _gemm_w8a8_persistent_kernel, (programs_of(config, q.device, tiles),),
        *operands, out, epilogue,
        num_tokens, out_features, in_features, q.stride(0), weight.stride(0), out.stride(0),
        EVEN_K=in_features % config.block_k == 0,
        **schedule(config, epilogue.low_rank.x is not None),
        BLOCK_T=config.block_t, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_T=GROUP_T, PARTS=config.parts,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip


def schedule(config: tuning.TileConfig, two_products: bool) -> dict[str, bool]:
    """Constants of the kernel. Triton 3.6 cannot specialize warps if an epilogue has products of its own, 3.7 never."""
    specialize = config.specialize and not two_products
    return {
        "TMA": config.loads == "tma",
        "FLATTEN": config.programs_per_sm > 0 and config.flatten and not specialize,
        "SPECIALIZE": specialize,
    }


def programs_of(config: tuning.TileConfig, device: torch.device, tiles: int) -> int:
    """How many programs share the tiles: one each if they do not stay, or if the GPU is unknown."""
    gpu = waves.gpu_of(device)
    if gpu is None or config.programs_per_sm == 0:
        return tiles
    return min(tiles, gpu.multiprocessors * config.programs_per_sm)


def _descriptor(codes: torch.Tensor, rows: int, config: tuning.TileConfig) -> TensorDescriptor:
    if codes.stride(0) % TMA_ALIGNMENT or codes.data_ptr() % TMA_ALIGNMENT:
        raise ValueError(
            f"gemm_w8a8: a launch with TMA needs rows at multiples of {TMA_ALIGNMENT} bytes, got strides "
            f"{list(codes.stride())}; take one with loads=pointers"
        )
    return TensorDescriptor(codes, list(codes.shape), list(codes.stride()), [rows, config.block_k])

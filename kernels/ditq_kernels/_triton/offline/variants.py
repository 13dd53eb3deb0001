"""Other ways to run a GEMM, to compile without tensors: programs that share a tile, that stay, that load by TMA.

A variant is called after its GEMM, such as "gemm_w8a8+split_k".
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from ditq_kernels._triton import gemm_w8a8_persistent
from ditq_kernels._triton.offline import epilogue as offline_epilogue
from ditq_kernels._triton.parts import split_k
from ditq_kernels.launch import tuning

SHARING = 3  # programs of one tile
SUMS = {"out_ptr": "*i32"}
# variant -> fields of the launch, its warps, architectures; no specialized warps: Triton 3.7 fails there
PERSISTENT: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "persistent": ({"programs_per_sm": 1}, 8, (80, 86, 89, 90, 120)),
    "persistent_two_loops": ({"programs_per_sm": 1, "flatten": False}, 4, (90,)),
    "tma": ({"loads": "tma"}, 4, (90,)),
    "tma_persistent": ({"loads": "tma", "programs_per_sm": 1}, 8, (90,)),
}


def split(specialize: Callable[..., Any]) -> Callable[..., Any]:
    """The same GEMM where SHARING programs share a tile."""

    def specialized(op: str, problem: Any, config: tuning.TileConfig) -> tuple[Any, dict[str, Any]]:
        kernel, constants = specialize(op.partition("+")[0], problem, config)
        return kernel, constants | {"SPLITS": SHARING, "epilogue": None}

    return specialized


def split_tiles(op: str, tables: tuple[str, ...], num_tokens: int, in_features: int) -> tuning.TileConfig:
    """Its launch."""
    found = tuning.tile_config(op.partition("+")[0], tables, num_tokens, in_features)
    return dataclasses.replace(found, split_k=SHARING)


def reduce_kernel(_: str, problem: Any, config: tuning.RowConfig) -> tuple[Any, dict[str, Any]]:
    """The second kernel of a shared tile, with the stages that need the most registers."""
    epilogue = offline_epilogue.epilogue_of("gemm_w8a8+residual", problem.zero_point)
    constants = {"SPLITS": SHARING, "BLOCK_T": config.rows, "BLOCK_N": split_k.BLOCK_N}
    return split_k._split_k_reduce_kernel, constants | {"epilogue": epilogue}


def reduce_rows(*_: Any) -> tuning.RowConfig:
    """Its launch, the same everywhere."""
    return tuning.RowConfig(split_k.BLOCK_T, split_k.NUM_WARPS)


def persistent(specialize: Callable[..., Any]) -> Callable[..., Any]:
    """W8A8 by the kernel of programs that stay, or that load by TMA."""

    def specialized(op: str, problem: Any, config: tuning.TileConfig) -> tuple[Any, dict[str, Any]]:
        _, constants = specialize(op.partition("+")[0], problem, config)
        constants |= gemm_w8a8_persistent.schedule(config, two_products=False)
        if config.loads == "tma":
            tiles = {"q_ptr": config.block_t, "weight_ptr": config.block_n}
            constants |= {k: f"tensordesc<i8[{n},{config.block_k}]>" for k, n in tiles.items()}
        del constants["SPLITS"]
        return gemm_w8a8_persistent._gemm_w8a8_persistent_kernel, constants

    return specialized


def persistent_tiles(
    op: str, tables: tuple[str, ...], num_tokens: int, in_features: int
) -> tuning.TileConfig:
    """Its launch: the narrow tiles, since sums and the epilogue of two tiles are alive at once."""
    fields, warps, _ = PERSISTENT[op.partition("+")[2]]
    found = tuning.tile_config("gemm_w8a8_epilogue", tables, num_tokens, in_features)
    return dataclasses.replace(found, split_k=1, num_warps=warps, num_stages=3, **fields)

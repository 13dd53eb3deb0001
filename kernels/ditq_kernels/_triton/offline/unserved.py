"""Launches for architectures without launch tables, where nobody has run a kernel of ours.

They borrow another architecture's. On sm_100 sums lie in a memory of the tensor cores and all of a tile's come to
registers at once, behind the loop; where that spills, the tile has fewer outputs or the program more warps.
"""

import dataclasses

from ditq_kernels._triton.offline.problem import Config
from ditq_kernels.launch import tuning

BORROWED = {100: 90}
SM_100_OUTPUTS = {
    "gemm_w8a8": 128, "gemm_w8a8+grouped": 128, "gemm_w8a8+qkv_quantize": 64, "gemm_w8a8+residual": 64,
}  # fmt: skip
SM_100_WARPS = {
    "attention_qk_int8_pv_int8": 8, "attention_qk_int8_pv_int8+strict": 8, "gemm_w8a8+qkv_quantize": 8,
}  # fmt: skip


def tables_of(target: int) -> tuple[str, ...]:
    """Names of launch tables, an unserved architecture's borrowed ones too."""
    return tuning.tables_of_architecture(f"sm_{BORROWED.get(target, target)}")


def adapted(op: str, target: int, config: Config) -> Config:
    """A borrowed launch as the architecture needs it."""
    if target != 100:
        return config
    if isinstance(config, tuning.TileConfig) and op in SM_100_OUTPUTS:
        config = dataclasses.replace(config, block_n=min(config.block_n, SM_100_OUTPUTS[op]))
    if op in SM_100_WARPS:
        config = dataclasses.replace(config, num_warps=max(config.num_warps, SM_100_WARPS[op]))
    return config

"""What can be compiled without tensors: problems, and how a kernel is made ready for one."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ditq_kernels.launch import tuning


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel is compiled for.

    Attributes:
        num_tokens: T, picks the configuration; the number of keys for attention.
        in_features: K, a multiple of 16; the head dimension for attention.
        group_size: neighbouring inputs sharing a group, for the int4 GEMMs.
        zero_point: activations are asymmetric, for the GEMMs; values, for attention.
    """

    num_tokens: int = 8192
    in_features: int = 1152
    group_size: int = 64
    zero_point: bool = False


Config = tuning.TileConfig | tuning.RowConfig | tuning.AttentionConfig
Specialized = tuple[Any, dict[str, Any]]  # the jit function and its constants


@dataclasses.dataclass(frozen=True)
class OfflineKernel:
    """One kernel of `offline_kernels`.

    Attributes:
        problems: what it meets in DiTs, the most telling one first.
        tuned: (op, names of tables, num_tokens, in_features) -> its launch.
        specialize: (op, problem, launch) -> the jit function and its constants.
        types: of arguments that differ from those in `offline_source`.
        targets: architectures it is for; None: all.
        checked: how many launches, of the first problems, the gate of machine code takes.
    """

    problems: tuple[Problem, ...]
    tuned: Callable[[str, tuple[str, ...], int, int], Config]
    specialize: Callable[[str, Problem, Any], Specialized]
    types: dict[str, str] = dataclasses.field(default_factory=dict)
    targets: tuple[int, ...] | None = None
    checked: int = 1

"""Launch configurations: data in `tuned/*.json`, looked up by device, op and shape. Nothing is timed here.

A table is a list of rows per op; the first row that fits wins. A row fits when the call has at most
`max_tokens` tokens and `max_in_features` inputs (absent: no limit); for attention these are keys and
the head dimension. The device's own table, such as
`NVIDIA_H200.json`, comes before the table of its architecture, such as `sm_90.json`.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import torch

# architectures without a table of their own, or with one for some ops, borrow that with the same shared memory
BORROWED_TABLES = {"sm_86": "sm_89", "sm_87": "sm_80", "sm_120": "sm_89", "sm_121": "sm_120"}


@dataclass(frozen=True)
class RowConfig:
    """Launch of a row-wise kernel."""

    rows: int  # tokens per program
    num_warps: int


@dataclass(frozen=True)
class TileConfig:
    """Launch of a GEMM: one program computes block_t tokens x block_n outputs.

    split_k is for gemm_w8a8 and gemm_w4a8 only: other GEMMs sum floats, where the order of sums shows. The fields after
    it up to specialize are for gemm_w8a8 only, and not together with split_k.
    """

    block_t: int
    block_n: int
    block_k: int  # inputs per iteration; gemm_w4a8 takes its packing unit instead
    num_warps: int
    num_stages: int
    split_k: int | Literal["auto"] = 1  # programs that share a tile's inputs; auto: see waves
    programs_per_sm: int = 0  # that stay and compute one tile after another; 0: one program a tile
    loads: Literal["pointers", "tma"] = "pointers"  # tma: sm_90
    flatten: bool = True  # programs that stay: tiles and inputs in one loop, in which loads run under the epilogue
    specialize: bool = False  # some warps load, others multiply: sm_90, Triton 3.6, 4 warps
    parts: int = (
        1  # 1, 2 or 4, of a tile, that the epilogue takes one after the other: fewer registers
    )


@dataclass(frozen=True)
class AttentionConfig:
    """Launch of an attention kernel: one program computes block_q queries of one head."""

    block_q: int
    block_k: int  # keys per iteration, at most; all keys in one tile are looked at once
    num_warps: int
    num_stages: int


# fields of a launch in words; the rest are sizes of its tile
WORDS = {
    "num_warps": "{} warps", "num_stages": "{} stages", "split_k": "split {}",
    "programs_per_sm": "persistent {}", "flatten": "two loops", "loads": "{}", "specialize": "specialized",
    "parts": "{} parts",
}  # fmt: skip
UNSAID: dict[str, tuple[Any, ...]] = {
    "split_k": (1, "auto"), "programs_per_sm": (0,), "flatten": (True,), "loads": ("pointers",),
    "specialize": (False,), "parts": (1,),
}  # fmt: skip


def launch_text(config: Mapping[str, Any]) -> str:
    """Fields of a launch as text, such as "128x256x64, 8 warps, 3 stages"."""
    tile = "x".join(str(size) for name, size in config.items() if name not in WORDS)
    said = [n for n in WORDS if n in config and config[n] not in UNSAID.get(n, ())]
    return ", ".join([tile, *(WORDS[name].format(config[name]) for name in said)])


def row_config(op: str, tables: tuple[str, ...], num_tokens: int, in_features: int) -> RowConfig:
    """Launch configuration of a row-wise kernel."""
    return RowConfig(**_fitting_row(op, tables, num_tokens, in_features))


def tile_config(op: str, tables: tuple[str, ...], num_tokens: int, in_features: int) -> TileConfig:
    """Launch configuration of a GEMM."""
    return TileConfig(**_fitting_row(op, tables, num_tokens, in_features))


def attention_config(
    op: str, tables: tuple[str, ...], num_keys: int, head_dim: int
) -> AttentionConfig:
    """Launch configuration of an attention kernel."""
    return AttentionConfig(**_fitting_row(op, tables, num_keys, head_dim))


@functools.cache
def tables_of(device: torch.device) -> tuple[str, ...]:
    """Names of the tables for a device, most specific first."""
    if device.type == "cpu":
        return ("interpreter",)  # a kernel sees CPU tensors only when Triton is interpreted
    major, minor = torch.cuda.get_device_capability(device)
    return tables_of_architecture(f"sm_{major}{minor}", own_table(device))


def own_table(device: torch.device) -> str:
    """Name of a GPU's own table, whether it exists or not."""
    return torch.cuda.get_device_name(device).replace(" ", "_")


def tables_of_architecture(architecture: str, own: str = "") -> tuple[str, ...]:
    """Names of the tables that exist for an architecture, such as "sm_90", after the GPU's own."""
    names = [own, architecture]
    while names[-1] in BORROWED_TABLES:
        names.append(BORROWED_TABLES[names[-1]])
    return tuple(name for name in names if name and load_table(name))


@functools.cache
def load_table(name: str) -> dict:
    """A parsed table of `tuned/`, empty if there is none."""
    path = resources.files("ditq_kernels") / "tuned" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _fitting_row(op: str, tables: tuple[str, ...], num_tokens: int, in_features: int) -> dict:
    for table in tables:
        for row in load_table(table)["ops"].get(op, ()):
            fits_tokens = num_tokens <= row.get("max_tokens", num_tokens)
            if fits_tokens and in_features <= row.get("max_in_features", in_features):
                return {key: value for key, value in row.items() if not key.startswith("max_")}
    raise NotImplementedError(
        f"{op}: no launch table covers this GPU (looked in {list(tables) or 'tuned/'}); "
        "run `ditq tune` on it, or use an sm_80, sm_86, sm_89, sm_90 or sm_120 GPU"
    )

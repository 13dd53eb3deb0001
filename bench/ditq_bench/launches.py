"""How many kernels a DiT block launches, fused and not: counted from the dispatcher, without a GPU.

    python -m ditq_bench.launches

Every operator that torch dispatches counts as one kernel, except those that make a view, reserve memory or return no
tensor. Each op of ours is one kernel on CUDA, but for attention with int8 values, which is two; a compiler may leave
fewer of torch's own.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ditq_runtime as ditq
from ditq_converters import Recipe, calibrate, convert, open_model
from ditq_runtime.families.adaln import HOISTED, HoistedModulation

SAMPLES = 2
RECIPES = {
    "W8A8 static": Recipe("smoothquant", "w8", "static", attention="none"),
    "W4A8 token": Recipe("smoothquant", "w4p", "token", attention="none"),
    "W8A8 static, int8 attention": Recipe("smoothquant", "w8", "static", attention="int8"),
    "W8A8 token, int8 attention": Recipe("smoothquant", "w8", "token", attention="int8"),
    "W4A8 token, low-rank branch": Recipe("smoothquant", "w4p", "token", lora_rank=8),
}


class Launches(TorchDispatchMode):
    """Counts operators while it is entered.

    Attributes:
        ops: `ditq.gemm_w8a8`, `aten.add`, ... -> how often.
    """

    def __init__(self) -> None:
        """Nothing counted yet."""
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator and run it."""
        name, returns = str(func).rpartition(".")[0], func._schema.returns
        views = any(r.alias_info and not r.alias_info.is_write for r in returns)
        tensors = any("Tensor" in str(r.type) for r in returns)
        if tensors and not views and "empty" not in name:
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))


def launches_of(block: nn.Module, width: int, tokens: int) -> Counter[str]:
    """Operators of one forward of a block whose modulation was computed before the sampling loop."""
    holder = HoistedModulation()
    holder.value = torch.randn(SAMPLES, 6 * width)
    setattr(block, HOISTED, holder)
    hidden = torch.randn(SAMPLES, tokens, width)
    with torch.no_grad(), Launches() as counted:
        block(hidden)
    delattr(block, HOISTED)
    return counted.ops


def table() -> list[str]:
    """The lines of the table in docs/performance.md, from `demo:digits`."""
    lines = ["| format | stock | fused | of the fused, ours |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        pipe = open_model("demo:digits")
        stats = calibrate(pipe, Path(folder) / "stats", steps=1, samples=1, quiet=True)
        for name, recipe in RECIPES.items():
            model: Any = convert(pipe.transformer, recipe, stats, quiet=True)
            block, width = model.transformer_blocks[1], model.inner_dim
            ditq.configure(model, fuse=False)
            stock = launches_of(block, width, tokens=16)
            ditq.configure(model, fuse=True)
            fused = launches_of(block, width, tokens=16)
            ours = sum(count for op, count in fused.items() if op.startswith("ditq."))
            lines.append(f"| {name} | {stock.total()} | {fused.total()} | {ours} |")
    return lines


if __name__ == "__main__":
    sys.stdout.write("\n".join([*table(), ""]))

"""How many kernels a block launches, fused and not: counted from the dispatcher, without a GPU.

    python -m ditq_bench.launches

Every operator that torch dispatches counts as one kernel, except those that make a view, reserve memory or return no
tensor. Each op of ours is one kernel on CUDA, but for attention whose int8 values come with tokens apart, which is two;
a compiler may leave fewer of torch's own.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import ditq_runtime as ditq
from ditq_converters import CalibrationStats, Recipe, calibrate, convert, open_model
from ditq_runtime.layers.carrier import here

SAMPLES, CAPTION_TOKENS = 2, 8
RECIPES = {
    "W8A8 static": Recipe("smoothquant", "w8", "static", attention="none"),
    "W4A8 token": Recipe("smoothquant", "w4p", "token", attention="none"),
    "W4A8 real groups, token": Recipe("smoothquant", "w4g", "token", attention="none"),
    "W8A8 static, int8 attention": Recipe("smoothquant", "w8", "static", attention="int8"),
    "W4A8 real groups, static, int8 attention": Recipe(
        "smoothquant", "w4g", "static", attention="int8"
    ),
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


def launches_of(block: Any, width: int, tokens: int) -> Counter[str]:
    """Operators of one forward of a block whose modulation was computed before the sampling loop."""
    here().hoisted = {block: torch.randn(SAMPLES, 6 * width)}
    hidden, caption = torch.randn(SAMPLES, tokens, width), {}
    if block.attn2 is not None:  # padded, with the mask as PixArt's model gives it
        mask = torch.zeros(SAMPLES, 1, CAPTION_TOKENS).index_fill_(2, torch.tensor([5, 6, 7]), -1e4)
        text = torch.randn(SAMPLES, CAPTION_TOKENS, width)
        caption = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    with torch.no_grad(), Launches() as counted:
        block(hidden, **caption)
    here().hoisted = None
    return counted.ops


def models(folder: Path) -> Iterator[tuple[str, Any, CalibrationStats]]:
    """Name, float transformer and statistics of each family with fused blocks; PixArt's is random."""
    plan: dict[str, Any] = {"steps": 1, "samples": 1, "quiet": True}
    pipe = open_model("demo:digits")
    yield "DiT", pipe.transformer, calibrate(pipe, folder / "dit", **plan)
    torch.manual_seed(0)
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=2, sample_size=8,
        caption_channels=32, cross_attention_dim=64,
    )  # fmt: skip
    prompts = folder / "prompts.safetensors"
    names = ("prompt_embeds", "negative_prompt_embeds")
    embeddings = {name: torch.randn(1, CAPTION_TOKENS, 32) for name in names}
    masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
    save_file(embeddings | {name: torch.ones(1, CAPTION_TOKENS) for name in masks}, prompts)
    yield "PixArt", pixart, calibrate(pixart, folder / "pixart", prompts=prompts, **plan)


def table() -> list[str]:
    """The lines of the table in docs/performance_blocks.md."""
    lines = ["| block | format | stock | fused | of the fused, ours |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for family, source, stats in models(Path(folder)):
            for name, recipe in RECIPES.items():
                model: Any = convert(source, recipe, stats, quiet=True)
                counts = []
                for fuse in (False, True):
                    ditq.configure(model, fuse=fuse)
                    block, width = model.transformer_blocks[1], model.inner_dim
                    counts.append(launches_of(block, width, tokens=16))
                stock, fused = counts
                ours = sum(count for op, count in fused.items() if op.startswith("ditq."))
                lines.append(f"| {family} | {name} | {stock.total()} | {fused.total()} | {ours} |")
    return lines


if __name__ == "__main__":
    sys.stdout.write("\n".join([*table(), ""]))

"""Open the checkpoint of DiT's own code (`DiT-XL-2-256x256.pt`, or a training run's) as a diffusers transformer.

The names differ, `attn.qkv` is split in three, the one embedder is copied into every block. Two numbers differ as well:
the layer norms have eps 1e-6, and the timestep frequencies are DiT's own (`ditq_runtime.layers.timestep_freq`).
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from ditq_runtime.layers.timestep_freq import set_timestep_freq

NUM_HEADS = {
    384: 6,
    768: 12,
    1024: 16,
    1152: 16,
}  # hidden size -> heads, of DiT-S, B, L, XL (Table 1)
NEEDED = {  # and how many dimensions it has
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "final_layer.linear.weight": 2,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.attn.qkv.weight": 2,
}
# what torch.load raises on damaged files, besides what it says on purpose
BROKEN = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError,
    AttributeError, OverflowError, AssertionError, struct.error,
)  # fmt: skip
POSITION_ERROR = 1e-2  # a bf16 checkpoint rounds values up to 1 by 2**-8
DROPPED = "pos_embed"  # fixed sines and cosines: diffusers computes them
WHOLE = {  # DiT's name -> diffusers' name, outside the blocks
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
IN_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
EMBEDDER = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}


def open_facebook_dit(
    path: str | Path,
    torch_dtype: torch.dtype = torch.float32,
    timestep_freq: str = "dit",
    num_heads: int | None = None,
) -> Any:
    """Read a `.pt` checkpoint; nothing in it is executed (`weights_only`).

    Args:
        path: of DiT's own code: a state dict, or a training checkpoint whose `ema` weights are taken.
        torch_dtype: of the weights.
        timestep_freq: `dit`, what the weights were trained with; `diffusers` for comparison with conversions that
            lost it. A packed checkpoint records it.
        num_heads: attention heads, which the weights do not tell; None: those of DiT-S, B, L and XL.

    Returns:
        A DiTTransformer2DModel.

    Raises:
        ValueError: not a DiT checkpoint; the message says what was expected.
    """
    state = _read(Path(path))
    config = _config(state, str(path), num_heads)
    from diffusers import DiTTransformer2DModel

    with init_empty_weights():
        model = DiTTransformer2DModel(**config)
    _check_positions(state[DROPPED], config, str(path))
    renamed = _rename(state, config["num_layers"])
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ renamed.keys()):
        raise ValueError(
            f"{path}: {name} is {'missing' if name in expected else 'unknown'}; not a DiT checkpoint"
        )
    for name, tensor in renamed.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}, {list(expected[name].shape)} expected"
            )
    model = DiTTransformer2DModel(**config)
    model.load_state_dict(renamed, assign=True)
    set_timestep_freq(model, timestep_freq)
    return model.to(torch_dtype).eval().requires_grad_(False)


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The weights; `ema` of a training checkpoint, whose only object besides tensors is its parsed arguments."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file; expected a checkpoint of DiT's own code")
    try:
        with (
            warnings.catch_warnings(
                action="ignore", category=UserWarning
            ),  # torch's, of old pickles
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file") from error
    except BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        told = "" if "weights_only" in reason else f" ({reason})"  # torch advises to run the code
        raise ValueError(
            f"{path}: not a checkpoint that can be read without running code from it{told}; expected a state dict of "
            "tensors, saved by torch"
        ) from error
    state = stored.get("ema", stored.get("model", stored)) if isinstance(stored, dict) else stored
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise ValueError(
            f"{path}: expected a state dict of tensors by name, or a dict with one under 'ema'"
        )
    room = path.stat().st_size
    for name, tensor in state.items():
        reason = _why_not(tensor, room)
        room -= tensor.numel() * tensor.dtype.itemsize
        if reason:
            raise ValueError(f"{path}: {name} {reason}; not a checkpoint of DiT's own code")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _why_not(tensor: torch.Tensor, room: int) -> str:
    """What is wrong with a tensor of a file that has this many bytes for it; empty: nothing."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return f"is {tensor.dtype}, float32, float16 or bfloat16 expected"
    if tensor.layout != torch.strided:
        return f"is stored as {tensor.layout}, a plain tensor expected"
    if tensor.numel() * tensor.dtype.itemsize > room:
        return f"claims {list(tensor.shape)} values, more than the file has bytes for"
    if not bool(torch.isfinite(tensor).all()):
        return "holds a value that is not finite"
    return ""


def _config(state: dict[str, torch.Tensor], path: str, num_heads: int | None) -> dict[str, Any]:
    """The sizes that the weights tell."""
    for name in NEEDED:
        if name not in state:
            raise ValueError(f"{path}: {name} is missing; not a checkpoint of DiT's own code")
        if state[name].dim() != NEEDED[name] or 0 in state[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {list(state[name].shape)}, {NEEDED[name]} dimensions expected; "
                "not a checkpoint of DiT's own code"
            )
    hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = num_heads or NUM_HEADS.get(hidden)
    if heads is None or hidden % heads:
        raise ValueError(
            f"{path}: the number of heads for hidden size {hidden} is not known; pass num_heads, a divisor of it"
        )
    blocks = {int(m[1]) for m in (re.match(r"blocks\.(\d{1,6})\.", name) for name in state) if m}
    if blocks != set(range(len(blocks))):
        missing = min(set(range(max(blocks) + 1)) - blocks)
        raise ValueError(
            f"{path}: holds weights of block {max(blocks)}, but none of block {missing}; "
            "not a checkpoint of DiT's own code"
        )
    for i in blocks:
        qkv = state.get(f"blocks.{i}.attn.qkv.weight")
        if qkv is None or qkv.shape != (3 * hidden, hidden):
            found = "none" if qkv is None else list(qkv.shape)
            raise ValueError(
                f"{path}: blocks.{i}.attn.qkv.weight: [{3 * hidden}, {hidden}] expected, got {found}"
            )
    return {
        "num_attention_heads": heads,
        "attention_head_dim": hidden // heads,
        "in_channels": channels,
        "out_channels": state["final_layer.linear.weight"].shape[0] // patch**2,
        "num_layers": max(blocks) + 1,
        "sample_size": math.isqrt(state["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "norm_eps": 1e-6,
    }


def _check_positions(stored: torch.Tensor, config: dict[str, Any], path: str) -> None:
    """DiT's positions are fixed sines and cosines, which diffusers computes: others would be lost.

    Raises:
        ValueError: they are others.
    """
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    side = config["sample_size"] // config["patch_size"]
    if stored.shape != (1, side * side, hidden):
        raise ValueError(
            f"{path}: pos_embed has shape {list(stored.shape)}, "
            f"[1, {side * side}, {hidden}] expected, for a square image"
        )
    fixed = get_2d_sincos_pos_embed(hidden, side, base_size=side, output_type="pt")
    if not torch.allclose(stored[0].double(), fixed.double(), atol=POSITION_ERROR):
        raise ValueError(
            f"{path}: pos_embed is not the fixed sines and cosines that diffusers computes; "
            "its images would be others"
        )


def _rename(state: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        owner, _, field = name.rpartition(".")
        match = re.match(r"blocks\.(\d+)\.(.+)", owner)
        if name == DROPPED:
            continue
        if owner in WHOLE:
            renamed[f"{WHOLE[owner]}.{field}"] = tensor
        elif owner in EMBEDDER:
            for i in range(num_layers):
                copy = f"transformer_blocks.{i}.norm1.emb.{EMBEDDER[owner]}.{field}"
                renamed[copy] = tensor.clone()
        elif match and match[2] == "attn.qkv" and tensor.dim() and len(tensor) % 3 == 0:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"transformer_blocks.{match[1]}.attn1.to_{part}.{field}"] = rows.clone()
        elif match and match[2] in IN_BLOCK:
            renamed[f"transformer_blocks.{match[1]}.{IN_BLOCK[match[2]]}.{field}"] = tensor
        else:
            renamed[name] = tensor  # refused later, by its name
    return renamed

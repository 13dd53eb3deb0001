"""Module trees of full models at a tiny width: what Python does with them is the same, and random weights will do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HEAD_DIM, SAMPLES, TOKENS_A_SIDE, CAPTION = 64, 2, 4, 8
STATIC = {"method": "smoothquant", "activations": "static", "attention": "int8"}


def steps(weights: tuple[str, ...] = ("w8", "w4p")) -> dict[str, Callable[[], Any]]:
    """Name -> a call of one block or one forward, packed on the CPU: make them before a stub takes its place."""
    found: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in weights:
            model = dit(name, Path(folder) / name)
            found[f"DiT block, {name} static"] = block_of(model)
            found[f"DiT-XL/2 step, {name} static"] = forward_of(model, dit_inputs())
    flux_model = flux()
    found["Flux step, w8 token"] = forward_of(flux_model, flux_inputs(flux_model))
    return found


def dit(weights: str, folder: Path, layers: int = 28) -> Any:
    """DiT-XL/2's tree, every block fused, with int8 attention and static scales."""
    from diffusers import DiTTransformer2DModel

    from ditq_converters import Recipe, calibrate, convert

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=HEAD_DIM, in_channels=1, out_channels=1, num_layers=layers,
        sample_size=TOKENS_A_SIDE, patch_size=1, num_embeds_ada_norm=1000,
    )  # fmt: skip
    stats = calibrate(model, folder, steps=1, samples=1, quiet=True)
    recipe: Any = {**STATIC, "weights": weights, "group_size": 32}
    return convert(model, Recipe(**recipe), stats, quiet=True)


def dit_inputs() -> dict[str, torch.Tensor]:
    """Of `dit`."""
    return {
        "hidden_states": torch.randn(SAMPLES, 1, TOKENS_A_SIDE, TOKENS_A_SIDE),
        "timestep": torch.full((SAMPLES,), 500),
        "class_labels": torch.zeros(SAMPLES, dtype=torch.int64),
    }


def block_of(model: Any) -> Callable[[], Any]:
    """One block in the middle, its modulation hoisted, as `prepare` leaves it."""
    from ditq_runtime.layers.carrier import here

    block, width = model.transformer_blocks[1], model.inner_dim
    hidden = torch.randn(SAMPLES, TOKENS_A_SIDE**2, width)
    hoisted = {block: torch.randn(SAMPLES, 6 * width)}

    def run() -> Any:
        here().hoisted = hoisted
        try:
            return block(hidden)
        finally:
            here().hoisted = None

    return run


def forward_of(model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    """A whole forward."""
    return lambda: model(**inputs, return_dict=False)


def flux() -> Any:
    """Flux.1-dev's tree: 19 double and 38 single blocks, a scale per token."""
    from diffusers import FluxTransformer2DModel

    from ditq_converters import Recipe, convert

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=19, num_single_layers=38, attention_head_dim=HEAD_DIM, num_attention_heads=1,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    return convert(model, Recipe("linear", "w8", "token"), None, quiet=True)


def flux_inputs(model: Any) -> dict[str, Any]:
    """Of `flux`."""
    tokens = TOKENS_A_SIDE**2
    return {
        "hidden_states": torch.randn(1, tokens, model.config.in_channels),
        "encoder_hidden_states": torch.randn(1, CAPTION, model.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(tokens, 3), "txt_ids": torch.zeros(CAPTION, 3),
    }  # fmt: skip

"""Module trees of full models at a tiny width: what Python does with them is the same, and random weights will do."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

HEAD_DIM, SAMPLES, TOKENS_A_SIDE, CAPTION = 64, 2, 4, 8
FLUX = {  # -> attention
    "Flux step": "none",
    "Flux step, int8 scores": "bf16",
    "Flux step, int8 attention": "int8",
}
STATIC = {"method": "smoothquant", "activations": "static", "attention": "int8"}


def packed(weights: tuple[str, ...] = ("w8", "w4p"), layers: int = 28) -> dict[str, Any]:
    """Name -> a packed model on the CPU: make them before a stub takes its place.

    Args:
        weights: of each DiT.
        layers: blocks of each DiT; Flux is made beside its full 28.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = {name: dit(name, Path(folder) / name, layers) for name in weights}
    if layers < 28:
        return found
    return found | {name: flux(attention) for name, attention in FLUX.items()}


def steps(models: dict[str, Any], device: torch.device) -> dict[str, Callable[[], Any]]:
    """Name -> a call of a block or a forward of `packed` models, modulation computed before as by `prepare`."""
    found: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        model.to(device)  # a stub's too: weights go into the order of its kernels
        if name in FLUX:
            found |= _flux_steps(name, model, device)
            continue
        blocks, width = model.transformer_blocks, model.inner_dim
        hoisted = {block: torch.randn(SAMPLES, 6 * width, device=device) for block in blocks}
        hidden = (torch.randn(SAMPLES, TOKENS_A_SIDE**2, width, device=device),)
        found[f"DiT block, {name} static"] = with_hoisted(partial(blocks[1], *hidden), hoisted)
        inputs = dit_inputs(device)
        found[f"DiT-XL/2 step, {name} static"] = forward_of(model, inputs, hoisted)
        if name == "w8":
            found["DiT-XL/2 step, CUDA graph"] = graph_of(model, inputs, hoisted)
    return found


def _flux_steps(name: str, model: Any, device: torch.device) -> dict[str, Callable[[], Any]]:
    from ditq_runtime.families.flux import FLUX as FAMILY

    assert FAMILY.hoistable is not None
    holders: Any = FAMILY.hoistable.holders(model)
    hoisted = {one: torch.randn(1, one.linear.out_features, device=device) for one in holders}
    inputs = flux_inputs(model, device)
    found = {f"{name}, w8 token": forward_of(model, inputs, hoisted)}
    if FLUX[name] == "none":
        if device.type == "cpu":
            found[f"{name}, w8 token, a norm of heads one operator"] = with_one_operator(
                forward_of(model, inputs, hoisted)
            )
        found[f"{name}, CUDA graph"] = graph_of(model, inputs, hoisted)
    return found


def with_one_operator(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call whose RMS norms are one operator, as on a GPU: a CPU takes seven, and its layer norm stands for them."""
    where: Any = torch

    def one(x: Any, shape: Any, weight: Any, eps: float) -> torch.Tensor:
        return torch.native_layer_norm(x, shape, weight, None, eps)[0]

    def run() -> Any:
        own, where.rms_norm = where.rms_norm, one
        try:
            return call()
        finally:
            where.rms_norm = own

    return run


class Replay:
    """Stands for a CUDA graph where there is none."""

    def replay(self) -> None:
        """Launch nothing."""

    def reset(self) -> None:
        """Free nothing."""


def graph_of(
    model: Any, inputs: dict[str, Any], hoisted: dict[Any, torch.Tensor]
) -> Callable[[], Any]:
    """A whole forward as `prepare` leaves it, replayed; without a GPU the replay does nothing."""
    from ditq_runtime.speed import cuda_graph
    from ditq_runtime.speed.hoist import HoistedRows

    model, places = copy.deepcopy((model, list(hoisted)))
    widths = [value.shape[1] for value in hoisted.values()]
    memory = torch.cat([value.flatten() for value in hoisted.values()])
    if not torch.cuda.is_available():
        cuda_graph._record = lambda forward, device: (Replay(), forward())
    cuda_graph.GraphedForward(model)
    return forward_of(model, inputs, HoistedRows(places, widths, memory))


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


def dit_inputs(device: torch.device) -> dict[str, torch.Tensor]:
    """Of `dit`."""
    return {
        "hidden_states": torch.randn(SAMPLES, 1, TOKENS_A_SIDE, TOKENS_A_SIDE, device=device),
        "timestep": torch.full((SAMPLES,), 500, device=device),
        "class_labels": torch.zeros(SAMPLES, dtype=torch.int64, device=device),
    }


def forward_of(
    model: Any, inputs: dict[str, Any], hoisted: dict[Any, torch.Tensor]
) -> Callable[[], Any]:
    """A whole forward."""
    return with_hoisted(partial(model, **inputs, return_dict=False), hoisted)


def with_hoisted(call: Callable[[], Any], hoisted: dict[Any, torch.Tensor]) -> Callable[[], Any]:
    """A call that finds modulation computed."""
    from ditq_runtime.layers.carrier import here

    def run() -> Any:
        here().hoisted = hoisted or None
        try:
            return call()
        finally:
            here().hoisted = None

    return run


def flux(attention: str) -> Any:
    """Flux.1-dev's tree: 19 double and 38 single blocks, a scale per token, float or quantized attention."""
    from diffusers import FluxTransformer2DModel

    from ditq_converters import Recipe, convert

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=19, num_single_layers=38, attention_head_dim=HEAD_DIM, num_attention_heads=1,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    return convert(model, Recipe("linear", "w8", "token", attention=attention), None, quiet=True)


def flux_inputs(model: Any, device: torch.device) -> dict[str, Any]:
    """Of `flux`."""
    tokens = TOKENS_A_SIDE**2
    found = {
        "hidden_states": torch.randn(1, tokens, model.config.in_channels),
        "encoder_hidden_states": torch.randn(1, CAPTION, model.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(tokens, 3), "txt_ids": torch.zeros(CAPTION, 3),
    }  # fmt: skip
    return {name: value.to(device) for name, value in found.items()}

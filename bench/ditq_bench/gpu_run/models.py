"""A step of random DiT-XL/2- and Flux-sized models: `python -m ditq_bench.gpu_run.models --out FILE`.

bf16 eager, and compiled with a CUDA graph, against ditq eager, as a graph, and compiled by its backend where there is
one. Weights are random where they stand: nothing is read or converted. A line of JSON a row, as they come, the most
telling first; a way that fails says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ditq_bench.gpu_run.stage import write_rows
from ditq_bench.timing import time_in_turn

DIT: dict[str, Any] = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_num_groups": 32,
}  # fmt: skip
FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "guidance_embeds": True,
}
TINY: dict[str, dict[str, Any]] = {  # of a rehearsal
    "dit": {**DIT, "num_attention_heads": 1, "attention_head_dim": 64, "num_layers": 1, "sample_size": 8},
    "flux": {
        **FLUX, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1,
        "attention_head_dim": 64, "joint_attention_dim": 32, "pooled_projection_dim": 16,
        "axes_dims_rope": (16, 24, 24),
    },
}  # fmt: skip
CASES = (("dit", 8), ("flux", 1), ("dit", 1))  # and images, twice for DiT's guidance
ROUNDS, SECONDS = 20, 6.0


def random_model(kind: str, config: dict[str, Any], device: torch.device, weights: str = "") -> Any:
    """A model with random weights on a device: float in bf16, or packed."""
    from accelerate import init_empty_weights
    from diffusers import DiTTransformer2DModel, FluxTransformer2DModel

    from ditq_runtime.families.fusible import examine, fusible_blocks
    from ditq_runtime.host import skeleton
    from ditq_runtime.host.on_the_fly import Choice, choose_formats
    from ditq_runtime.layers.arranged import arrange_weights

    with init_empty_weights():
        model: Any = (DiTTransformer2DModel if kind == "dit" else FluxTransformer2DModel)(**config)
    model = model.to(torch.bfloat16)
    if weights:
        skeleton.install(model, choose_formats(model, Choice(weights)), torch.bfloat16)
    model.to_empty(device=device)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _fill(name, tensor.data)
    arrange_weights(model)
    for block in fusible_blocks(model).values():
        examine(block)
    return model.eval().requires_grad_(False)


def _fill(name: str, tensor: torch.Tensor) -> None:
    """Values that a packed model may hold: small floats, positive scales, codes."""
    if tensor.is_floating_point():
        tensor.normal_(std=0.02)
        if name.endswith(("scale", "smooth_inv")):
            tensor.abs_().add_(1e-3)
    elif name.endswith(("weight_sum", "act_zero")):
        tensor.zero_()
    else:
        tensor.random_(1, 16)


def inputs_of(kind: str, model: Any, images: int, device: torch.device) -> dict[str, Any]:
    """A batch; DiT's is guided."""
    half: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    if kind == "dit":
        side, batch = model.config.sample_size, 2 * images
        return {
            "hidden_states": torch.randn(batch, 4, side, side, **half),
            "timestep": torch.full((batch,), 500, device=device),
            "class_labels": torch.zeros(batch, dtype=torch.int64, device=device),
        }
    config, tokens, caption = (
        model.config,
        4096 if model.inner_dim > 64 else 16,
        512 if model.inner_dim > 64 else 8,
    )
    return {
        "hidden_states": torch.randn(images, tokens, config.in_channels, **half),
        "encoder_hidden_states": torch.randn(images, caption, config.joint_attention_dim, **half),
        "pooled_projections": torch.randn(images, config.pooled_projection_dim, **half),
        "timestep": torch.full((images,), 0.5, **half), "guidance": torch.full((images,), 3.5, **half),
        "img_ids": torch.zeros(tokens, 3, **half), "txt_ids": torch.zeros(caption, 3, **half),
    }  # fmt: skip


def ways(
    model: Any, inputs: dict[str, Any], packed: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name -> a step; made one after the other, as a compiled or captured model is no longer the one before."""
    from ditq_runtime.speed.cuda_graph import GraphedForward

    def step() -> Any:
        return model(**inputs, return_dict=False)

    name = "ditq W8A8" if packed else "bf16"
    yield f"{name}, eager", step
    if torch.cuda.is_available():
        graph = GraphedForward(model)
        yield f"{name}, graph", step
        graph.remove()
    if packed and "ditq" not in torch._dynamo.list_backends(exclude_tags=()):
        return
    options: dict[str, Any] = {"backend": "ditq"} if packed else {}
    compiled: Any = torch.compile(model, **options) if torch.cuda.is_available() else model
    yield f"{name}, compiled", lambda: compiled(**inputs, return_dict=False)


def rows_of(device: torch.device, rehearsal: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """What is written: for each model packed and bf16, way by way."""
    configs = TINY if rehearsal else {"dit": DIT, "flux": FLUX}
    end = time.perf_counter() + seconds
    for (kind, images), weights in ((case, weights) for case in CASES for weights in ("w8", "")):
        case = {"model": kind, "images": images}
        try:
            model = random_model(kind, configs[kind], device, weights)
            inputs = inputs_of(kind, model, images, device)
            for name, step in ways(model, inputs, bool(weights)):
                if time.perf_counter() > end:
                    return
                (t,) = time_in_turn({name: step}, device, ROUNDS, SECONDS).values()
                times = {"p20_ms": 1e3 * t.p20, "median_ms": 1e3 * t.median, "p80_ms": 1e3 * t.p80}
                yield case | {
                    "way": name,
                    **times,
                    "rounds": t.rounds,
                    "bytes": model.get_memory_footprint(),
                }
        except Exception as error:  # one model must not hide the others
            yield case | {"way": weights or "bf16", "failed": " ".join(str(error).split())[:300]}


def main() -> None:
    """Time them. Exit code 1 if a way failed."""
    write_rows("time steps of random models", rows_of, 115.0, ("failed", "ways failed"))


if __name__ == "__main__":
    main()

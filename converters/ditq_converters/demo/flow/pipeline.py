"""Opens the flow model as a real `FluxPipeline`, from its one asset file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ditq_converters.demo.bundle import FLOW_FILE, load_asset
from ditq_converters.demo.digits import DIGIT_NAMES
from ditq_converters.demo.flow.architecture import build_scheduler, build_transformer
from ditq_converters.demo.flow.text import NO_PROMPT, build_encoders, build_tokenizers
from ditq_converters.demo.identity_vae import build_identity_vae
from ditq_runtime.calls.saved import ATTRIBUTE

if TYPE_CHECKING:
    from diffusers import FluxPipeline

PARTS = ("transformer", "text_encoder", "text_encoder_2")
SIDE = 8  # of the latents; the VAE enlarges it 4 times
CALL = {  # what its folder says: as it was trained, guided, and no more text tokens than a prompt has
    "prompt": list(DIGIT_NAMES),
    "negative_prompt": NO_PROMPT,
    "true_cfg_scale": 1.5,
    "num_inference_steps": 20,
    "height": 4 * SIDE,
    "width": 4 * SIDE,
    "max_sequence_length": 8,
}


def assemble(transformer: Any, encoders: tuple[Any, Any]) -> FluxPipeline:
    """Put a transformer and two text encoders into a pipeline whose images are 32 x 32 unless told otherwise."""
    from diffusers import FluxPipeline

    tokenizer, tokenizer_2 = build_tokenizers()
    text_encoder, text_encoder_2 = encoders
    pipe = FluxPipeline(
        build_scheduler(),
        build_identity_vae(shift_factor=0.0),
        text_encoder,
        tokenizer,
        text_encoder_2,
        tokenizer_2,
        transformer,
    )
    pipe.default_sample_size = SIDE
    setattr(pipe, ATTRIBUTE, CALL)
    return pipe


def join(
    transformer: dict[str, torch.Tensor], *encoders: torch.nn.Module
) -> dict[str, torch.Tensor]:
    """A transformer's state dict and the encoders' parameters, under their pipeline's names."""
    states: list[dict[str, torch.Tensor]] = [transformer]
    states += [dict(encoder.named_parameters()) for encoder in encoders]
    return {
        f"{part}.{name}": tensor.detach()
        for part, state in zip(PARTS, states, strict=True)
        for name, tensor in state.items()
    }


def load_flow(folder: Path | None = None) -> FluxPipeline:
    """Load the trained pipeline (fp32, CPU).

    Args:
        folder: where to look; by default the assets that are installed with this package.

    Raises:
        ImportError: transformers is not installed.
    """
    if find_spec("transformers") is None:
        raise ImportError(
            "demo:digits-flow: its text encoders need transformers; run `pip install transformers`"
        )
    tensors = load_asset(FLOW_FILE, folder)
    transformer, encoders = build_transformer(), build_encoders()
    for part, model in zip(PARTS, (transformer, *encoders), strict=True):
        _fill(model, {name: tensors.pop(f"{part}.{name}") for name, _ in model.named_parameters()})
    assert not tensors, f"{FLOW_FILE} holds more than the model: {sorted(tensors)}"
    return assemble(transformer, encoders)


@torch.no_grad()
def _fill(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.shape == tensors[name].shape, name
        parameter.copy_(tensors[name])

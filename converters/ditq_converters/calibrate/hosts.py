"""How to call each transformer class on latents: what its pipeline passes, and what it is conditioned on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.captions import Captions

PIXELS_PER_LATENT = 8
FLUX_LATENT_SIZE = 64  # 512 pixels; Flux's configuration names no size


@dataclass(frozen=True)
class Batch:
    """One forward's worth of samples.

    Attributes:
        latents: [B, C, H, W] in the model's dtype, on its device.
        timestep: [B] of the scheduler.
        ids: [B] class ids, or rows of `captions`.
        captions: of a text-conditioned model.
        guidance: for a model that is told its guidance weight.
    """

    latents: torch.Tensor
    timestep: torch.Tensor
    ids: torch.Tensor
    captions: Captions | None
    guidance: float

    def caption(self, name: str) -> torch.Tensor:
        """The samples' rows of one caption tensor."""
        assert self.captions is not None
        return self.captions.take(name, self.ids, self.latents)


@dataclass(frozen=True)
class Host:
    """How to sample from one transformer class.

    Attributes:
        call: model, batch -> prediction [B, C or 2 C, H, W].
        latent_shape: model -> (C, H, W).
        sampler: that it is calibrated with unless told otherwise.
        captions: model -> caption tensors it needs and the size of their last dimension; empty: it takes class ids.
        distilled: it is told its guidance weight, so no null half is run.
        caption_tokens: that its pipeline pads a prompt to.
    """

    call: Callable[[Any, Batch], torch.Tensor]
    latent_shape: Callable[[Any], tuple[int, int, int]]
    sampler: str
    captions: Callable[[Any], dict[str, int]]
    distilled: bool = False
    caption_tokens: int = 0


def host_of(model: nn.Module) -> Host:
    """The host of a transformer; ValueError if nobody told ditq how to call it."""
    architecture = type(model).__name__
    if architecture not in HOSTS:
        raise ValueError(
            f"ditq does not know how to sample from {architecture} by itself; convert it without data: "
            "method linear, activations token"
        )
    return HOSTS[architecture]


def _square(model: Any) -> tuple[int, int, int]:
    return model.config.in_channels, model.config.sample_size, model.config.sample_size


def _call_dit(model: Any, batch: Batch) -> torch.Tensor:
    classes = batch.ids.to(batch.latents.device)
    out: torch.Tensor = model(batch.latents, timestep=batch.timestep, class_labels=classes).sample
    return out


def _call_pixart(model: Any, batch: Batch) -> torch.Tensor:
    latents = batch.latents
    added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        pixels = PIXELS_PER_LATENT * torch.tensor(latents.shape[-2:]).to(latents)
        added = {
            "resolution": pixels.expand(len(latents), 2),
            "aspect_ratio": (pixels[:1] / pixels[1:]).expand(len(latents), 1),
        }
    out: torch.Tensor = model(
        latents,
        encoder_hidden_states=batch.caption("prompt_embeds"),
        encoder_attention_mask=batch.caption("prompt_attention_mask"),
        timestep=batch.timestep,
        added_cond_kwargs=added,
    ).sample
    return out


def _call_sd3(model: Any, batch: Batch) -> torch.Tensor:
    out: torch.Tensor = model(
        hidden_states=batch.latents,
        timestep=batch.timestep,
        encoder_hidden_states=batch.caption("prompt_embeds"),
        pooled_projections=batch.caption("pooled_prompt_embeds"),
    ).sample
    return out


def _call_flux(model: Any, batch: Batch) -> torch.Tensor:
    """Flux takes patches of 2 x 2 as tokens, sigma for the timestep, and its guidance weight as an input."""
    latents, text = batch.latents, batch.caption("prompt_embeds")
    b, c, h, w = latents.shape
    tokens = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    rows, columns = torch.arange(h // 2), torch.arange(w // 2)
    ids = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), rows, columns)
    guidance = None
    if model.config.guidance_embeds:
        guidance = torch.full((b,), batch.guidance, device=latents.device, dtype=torch.float32)
    out: torch.Tensor = model(
        hidden_states=tokens.reshape(b, -1, 4 * c),
        timestep=batch.timestep.to(latents.dtype) / 1000,
        guidance=guidance,
        pooled_projections=batch.caption("pooled_prompt_embeds"),
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3).to(latents),
        img_ids=ids.to(latents),
    ).sample
    patches = out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c, h, w)


def _joint_captions(model: Any) -> dict[str, int]:
    config = model.config
    widths = config.joint_attention_dim, config.pooled_projection_dim
    return dict(zip(("prompt_embeds", "pooled_prompt_embeds"), widths, strict=True))


HOSTS = {
    "DiTTransformer2DModel": Host(_call_dit, _square, "ddim", lambda model: {}),
    "PixArtTransformer2DModel": Host(
        _call_pixart,
        _square,
        "ddim",
        lambda model: {
            "prompt_embeds": model.config.caption_channels or model.inner_dim,
            "prompt_attention_mask": 0,
        },
        caption_tokens=300,
    ),
    "SD3Transformer2DModel": Host(_call_sd3, _square, "flow", _joint_captions, caption_tokens=333),
    "FluxTransformer2DModel": Host(
        _call_flux,
        lambda model: (model.config.in_channels // 4, FLUX_LATENT_SIZE, FLUX_LATENT_SIZE),
        "flow",
        _joint_captions,
        distilled=True,
        caption_tokens=512,
    ),
}

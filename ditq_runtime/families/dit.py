"""DiT (Peebles and Xie, arXiv:2212.09748), as diffusers' DiTTransformer2DModel: the table and the packed block.

Chunks of `norm1.linear`: 0 shift_msa, 1 scale_msa, 2 gate_msa, 3 shift_mlp, 4 scale_mlp, 5 gate_mlp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditq_runtime.families.sites import (
    TIMESTEP_GROUPS,
    AdaLN,
    Family,
    OnTheFly,
    Site,
    ValueRows,
)

SITES = (
    Site("qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), AdaLN("norm1.linear", 0, 1)),
    Site("o_proj", ("attn1.to_out.0",), ValueRows("attn1.to_v")),
    Site("fc1", ("ff.net.0.proj",), AdaLN("norm1.linear", 3, 4)),
    Site(
        "fc2",
        ("ff.net.2",),
        OnTheFly("its input is the output of GELU, which no factor passes through"),
    ),
)


def modulate(
    hidden: torch.Tensor, norm: nn.LayerNorm, multiplier: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """AdaLN in canonical form: LN(h) * a + b (HTG Eq. 11, PTQ4DiT Eq. 19-21), in fp32 or wider.

    Args:
        hidden: [B, T, D] the residual stream, any float dtype.
        norm: its layer norm, with or without affine parameters.
        multiplier: [B, D] a = (1 + scale) / s, as the folded modulation linear gives it.
        shift: [B, D] b = shift / s.

    Returns:
        [B, T, D] in fp32 (fp64 for fp64 input): the quantizer that follows sees no half-precision rounding.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight, bias = (p if p is None else p.to(wide) for p in (norm.weight, norm.bias))
    normed = nn.functional.layer_norm(
        hidden.to(wide), norm.normalized_shape, weight, bias, norm.eps
    )
    return normed * multiplier[:, None] + shift[:, None]


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    timestep: torch.Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: torch.Tensor | None = None,
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """One DiT block whose modulation linear emits the AdaLN multiplier itself; diffusers' signature."""
    if encoder_hidden_states is not None or encoder_attention_mask is not None:
        raise ValueError(
            "DiT blocks have no cross-attention: encoder_hidden_states and its mask must be None"
        )
    groups = getattr(self, TIMESTEP_GROUPS, None)
    if groups is not None:
        groups(timestep)
    embedding = self.norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
    modulation = self.norm1.linear(self.norm1.silu(embedding))
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)

    x = modulate(hidden_states, self.norm1.norm, scale_msa, shift_msa)
    x = self.attn1(x, attention_mask=attention_mask, **(cross_attention_kwargs or {}))
    hidden_states = (hidden_states + gate_msa[:, None] * x).to(hidden_states.dtype)

    x = modulate(hidden_states, self.norm3, scale_mlp, shift_mlp)
    x = self.ff(x)
    return (hidden_states + gate_mlp[:, None] * x).to(hidden_states.dtype)


def use_direct_multiplier(block: nn.Module) -> None:
    """Give a stock block the forward above by swapping its class for a subclass of the same name.

    A class swap, not a patched method: hooks of accelerate and diffusers, deep copies and compilation keep working.
    """
    stock = type(block)
    block.__class__ = _subclass(stock)


_SUBCLASSES: dict[type, type] = {}


def _subclass(stock: type) -> type:
    if stock not in _SUBCLASSES:
        _SUBCLASSES[stock] = type(stock.__name__, (stock,), {"forward": _forward})
    return _SUBCLASSES[stock]


def example_inputs(model: Any) -> dict[str, Any]:
    """One image, one timestep, one class: keyword arguments for a forward of `model`."""
    size, channels = model.config.sample_size, model.config.in_channels
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, channels, size, size, generator=generator)
    return {
        "hidden_states": latents.to(parameter.device, parameter.dtype),
        "timestep": torch.tensor([500], device=parameter.device),
        "class_labels": torch.tensor([0], device=parameter.device),
    }


DIT = Family(
    architecture="DiTTransformer2DModel",
    blocks="transformer_blocks",
    sites=SITES,
    modulations={"norm1.linear": 6},
    kept={
        "norm1.emb": "timestep and label embedder: one row per image, kept float",
        "proj_out_1": "modulation of the final layer, kept float",
        "proj_out_2": "final projection, kept float",
    },
    shared_embedder="norm1.emb",
    use_direct_multiplier=use_direct_multiplier,
    example_inputs=example_inputs,
)

"""The processor that makes a diffusers `Attention` run `QuantAttention` between its own projections.

A plain object without state, set on one module at a time; the scales live in the module's child `core`, where hooks,
casts and the state dict find them. What the processor would have to drop it refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from ditq_runtime.attention.quantized import Streams
from ditq_runtime.format.attention import CORE

MASKED = -9984.0  # the bias of a masked key, -10000, in bf16: exp gives 0 for any logits below 4900
Names = tuple[str, ...]
IMAGE, NORMS = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
RMS_NORMS = (RMSNorm, nn.RMSNorm)


class LocalProcessor:
    """A processor whose attention sees all tokens on one device; it has no state."""

    @property
    def _parallel_config(self) -> None:
        """What diffusers' `enable_parallelism` sets where it splits tokens over devices."""

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if config is not None:
            raise NotImplementedError(
                "quantized attention does not split tokens over devices; context parallelism needs a checkpoint "
                "converted with --attention none"
            )


class QuantAttnProcessor(LocalProcessor):
    """Q, K and V from the module's projections, its `core` between, its output projection behind.

    `upcast_attention` asks for nothing more: logits are integers and the softmax is fp32 always.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As diffusers calls it.

        Args:
            attn: the `Attention`.
            hidden_states: [B, Tq, K].
            encoder_hidden_states: [B, Tk, K'] of a cross-attention; None: hidden_states.
            attention_mask: [B, Tk] or [B, 1, Tk]: bool, True where a key is attended; or a bias, 0 there and at most
                `MASKED` elsewhere.

        Returns:
            [B, Tq, N].

        Raises:
            NotImplementedError: a mask of another kind, or images instead of tokens.
        """
        if hidden_states.dim() != 3:
            raise NotImplementedError(
                f"quantized attention: hidden_states must be [B, T, K], got {list(hidden_states.shape)}; "
                "flatten pixels to tokens"
            )
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key_mask = key_mask_of(attention_mask, *source.shape[:2])
        core = getattr(attn, CORE)
        query, key, value = project(attn, hidden_states, IMAGE, source)
        heads = (operand([normed(attn, *of)]) for of in zip(NORMS, (query, key), strict=True))
        context = core(*heads, value, key_mask).flatten(2)
        return attn.to_out[1](attn.to_out[0](context))


def project(
    attn: Any, x: torch.Tensor, projections: Names, source: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Q of x [B, T, K], and K and V of a source [B, T', K'] or of x: [B, T, H, D] each, before any norm."""
    inputs = (x, *[x if source is None else source] * 2)
    return tuple(
        getattr(attn, name)(y).unflatten(-1, (attn.heads, -1))
        for name, y in zip(projections, inputs, strict=True)
    )


def normed(
    attn: Any, name: str, x: torch.Tensor, **rotation: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Queries or keys [B, T, H, D] of a stream for `QuantAttention`, the norm of this name and a rotation with them.

    An RMS norm goes into the quantizer; any other, or one that something hooks, runs here.
    """
    norm = attn._modules.get(name)
    if norm is None:
        return x, rotation
    before = in_quantizer(norm)
    return (norm(x), rotation) if before is None else (x, before | rotation)


def operand(streams: Streams) -> torch.Tensor | Streams:
    """What `QuantAttention` is called with: a tensor alone where it has nothing to do before its codes."""
    return streams[0][0] if len(streams) == 1 and not streams[0][1] else streams


def in_quantizer(norm: Any) -> dict[str, Any] | None:
    """An RMS norm of heads as `ditq_kernels.quantize_heads` takes it; None if only the module itself will do."""
    own, held = vars(norm), norm._parameters  # not by attribute: torch looks for those in Python
    hooked = norm._forward_hooks or norm._forward_pre_hooks or "_hf_hook" in own
    if hooked or type(norm) not in RMS_NORMS or held.get("bias") is not None:
        return None
    weight, eps = held.get("weight"), own["eps"]
    if weight is None or eps is None:
        return None
    return {"norm_weight": weight.data if weight.requires_grad else weight, "eps": eps}


def key_mask_of(mask: torch.Tensor | None, batch: int, keys: int) -> torch.Tensor | None:
    """The mask [B, Tk] bool of an `attention_mask`.

    Raises:
        NotImplementedError: it is no mask over keys.
        RuntimeError: it is a bias that neither leaves a key nor masks it; on CUDA a device-side assertion.
    """
    if mask is None:
        return None
    is_mask = mask.dtype == torch.bool or mask.is_floating_point()
    if not is_mask or tuple(mask.shape) not in ((batch, keys), (batch, 1, keys)):
        raise NotImplementedError(
            f"quantized attention: attention_mask must be [{batch}, {keys}], bool or a bias, got "
            f"{list(mask.shape)} {mask.dtype}; masks per query or head need a checkpoint converted with "
            "--attention none"
        )
    flat = mask.reshape(batch, keys).contiguous()
    return flat if mask.dtype == torch.bool else _attended(flat)


def _attended(bias: torch.Tensor) -> torch.Tensor:
    """Where a bias [B, Tk] is 0; all keys of an image that masks all: softmax ignores a bias that they share."""
    attended = bias == 0
    torch._assert_async(
        (attended | (bias <= MASKED)).all(),
        f"quantized attention: a bias must be 0 (attended) or at most {MASKED:.0f} (masked) at every key; other "
        "biases need a checkpoint converted with --attention none",
    )
    return attended | ~attended.any(1, keepdim=True)

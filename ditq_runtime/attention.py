"""QuantAttention: the two products of an attention in low bits, between any projections.

It holds the calibrated scales and knows neither projections nor diffusers, so every family may use it; what a class
of diffusers does around it stands in `attention_processor.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import ditq_kernels as k
from ditq_runtime.attention_format import AttentionFormat
from ditq_runtime.pinned import Pinned


class QuantAttention(Pinned):
    """softmax(softmax_scale * Q K^T) V with int8 Q and K; P and V int8 or bf16.

    P is quantized relative to the largest of its row and normalized by the sum of its codes (see
    `ditq_kernels.attention`).

    Attributes:
        format: how it runs.
        heads: H.
        softmax_scale: multiplies the logits, usually D ** -0.5.
        q_scale: and k_scale, v_scale: fp32 [H], where the format is static.
    """

    q_scale: nn.Parameter
    k_scale: nn.Parameter
    v_scale: nn.Parameter

    def __init__(
        self,
        heads: int,
        attention_format: AttentionFormat,
        softmax_scale: float,
        device: torch.device | str = "meta",
    ) -> None:
        """Allocate the stored scales, uninitialized."""
        super().__init__()
        self.heads, self.format, self.softmax_scale = heads, attention_format, softmax_scale
        for name, (dtype, shape) in attention_format.tensors(heads).items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        **out: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [B, Tq, H, D] fp32 | fp16 | bf16, after norms and rotary embedding.
            key: [B, Tk, H, D].
            value: [B, Tk, H, D].
            key_mask: [B, Tk] bool, True where a key is attended.
            out: `QuantLinear.static_input` of the layer behind, for int8 codes.

        Returns:
            [B, Tq, H, D] in the dtype of the query, or int8 codes.
        """
        (q, q_scale), (keys, k_scale) = self._codes(query, "q_scale"), self._codes(key, "k_scale")
        rest: dict[str, Any] = {
            "softmax_scale": self.softmax_scale,
            "key_mask": key_mask,
            **(out or {"out_dtype": query.dtype}),
        }
        if self.format.values == "bf16":
            v = value.to(torch.bfloat16).transpose(1, 2)
            made = k.attention_qk_int8_pv_bf16(q, keys, v, q_scale, k_scale, **rest)
        else:
            v, v_scale = self._value_codes(value, key_mask)
            made = k.attention_qk_int8_pv_int8(q, keys, v, q_scale, k_scale, v_scale, **rest)
        return made.transpose(1, 2)

    def of_codes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **out: Any
    ) -> torch.Tensor:
        """Attend to what is quantized already, with int8 values and static scales.

        Args:
            query: [B, H, Tq, D] int8.
            key: [B, H, Tk, D] int8.
            value: [B, H, Tk, D] int8; tokens contiguous save a pass.
            out: as in `forward`, or `out_dtype`.

        Returns:
            [B, Tq, H, D] out_dtype, or int8 codes.
        """
        scales = self.q_scale.data, self.k_scale.data, self.v_scale.data
        made = k.attention_qk_int8_pv_int8(
            query, key, value, *scales, softmax_scale=self.softmax_scale, **out
        )
        return made.transpose(1, 2)

    def _codes(self, x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int8 [B, H, T, D] of x [B, T, H, D], and their scale: [B, H, T], or the stored [H]."""
        if self.format.scales == "static":
            scale: torch.Tensor = getattr(self, name).data
            return _static_codes(x, scale), scale
        batch, tokens, heads, head_dim = x.shape
        codes, scale = k.quantize_per_token(x.reshape(-1, head_dim))
        by_head = scale.view(batch, tokens, heads).transpose(1, 2).contiguous()
        return codes.view(x.shape).transpose(1, 2), by_head

    def _value_codes(
        self, value: torch.Tensor, key_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int8 [B, H, T, D], and their scale: [B, H], so that no image depends on its batch, or [H].

        Padding has no say in the scale: masked values may clip, their probability is 0.
        """
        if self.format.scales == "static":
            return self._codes(value, "v_scale")
        absmax = value.abs().amax(3)  # [B, T, H]
        if key_mask is not None:
            absmax = absmax.masked_fill(~key_mask[..., None], 0)
        scale = k.symmetric_scale(absmax.amax(1))
        return k.quantize_symmetric(value, scale[:, None, :, None]).transpose(1, 2), scale

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"heads={self.heads}, {self.format}"


def _static_codes(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes int8 [B, H, T, D] of x [B, T, H, D] with one scale per head.

    The op has one scale for all columns: each column is multiplied by the reciprocal of its head's, and 1 is left.
    """
    batch, tokens, heads, head_dim = x.shape
    inv_scale = (torch.ones_like(scale) / scale).repeat_interleave(head_dim)
    one = torch.ones(1, dtype=torch.float32, device=x.device)
    zero = torch.zeros(1, dtype=torch.int32, device=x.device)
    codes = k.quantize_static(x.reshape(-1, heads * head_dim), one, zero, inv_scale)
    return codes.view(batch, tokens, heads, head_dim).transpose(1, 2)

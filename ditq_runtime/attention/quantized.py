"""QuantAttention: the two products of an attention in low bits, between any projections.

It holds the calibrated scales and knows neither projections nor diffusers, so every family may use it; what a class
of diffusers does around it stands in `attention_processor.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import ditq_kernels as k
from ditq_runtime.format.attention import AttentionFormat
from ditq_runtime.layers.pinned import Pinned


class QuantAttention(Pinned):
    """softmax(softmax_scale * Q K^T) V with int8 Q and K; P and V int8 or bf16.

    P is quantized relative to the largest of its row and normalized by the sum of its codes (see
    `ditq_kernels.ops.attention`).

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
        if self.format.scales == "token":
            values = self.format.values
            return attend_per_token(query, key, value, key_mask, values, self.softmax_scale, **out)
        steps: list[torch.Tensor] = [self.q_scale.data, self.k_scale.data]
        codes = [_static_codes(query, steps[0]), _static_codes(key, steps[1])]
        if self.format.values == "bf16":
            codes.append(_bf16(value))
        else:
            steps.append(self.v_scale.data)
            codes.append(_static_codes(value, steps[2]))
        rest = out or {"out_dtype": query.dtype}
        return _attend(codes, steps, key_mask, self.softmax_scale, **rest)

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

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"heads={self.heads}, {self.format}"


def attend_per_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    values: str,
    softmax_scale: float,
    **out: Any,
) -> torch.Tensor:
    """Attend with scales of what is there: one per token and head of Q and K, one per image and head of int8 V.

    Args:
        query: as in `QuantAttention.forward`, like all but the next two.
        key: the same.
        value: the same.
        key_mask: the same.
        values: `int8` or `bf16`.
        softmax_scale: multiplies the logits.
        out: the same.

    Returns:
        The same.
    """
    (q, q_scale), (keys, k_scale) = _token_codes(query), _token_codes(key)
    codes, steps = [q, keys], [q_scale, k_scale]
    if values == "bf16":
        codes.append(_bf16(value))
    else:
        v, v_scale = _image_codes(value, key_mask)
        codes.append(v)
        steps.append(v_scale)
    return _attend(codes, steps, key_mask, softmax_scale, **(out or {"out_dtype": query.dtype}))


def _attend(
    codes: list[torch.Tensor],
    steps: list[torch.Tensor],
    key_mask: torch.Tensor | None,
    softmax_scale: float,
    **out: Any,
) -> torch.Tensor:
    """[B, Tq, H, D] of Q, K, V [B, H, T, D]; V is int8 if it has a step, else bf16."""
    product = k.attention_qk_int8_pv_int8 if len(steps) == 3 else k.attention_qk_int8_pv_bf16
    made = product(*codes, *steps, softmax_scale=softmax_scale, key_mask=key_mask, **out)
    return made.transpose(1, 2)


def _bf16(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16).transpose(1, 2)


def _token_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [B, H, T, D] of x [B, T, H, D], and their scale [B, H, T]."""
    batch, tokens, heads, head_dim = x.shape
    codes, scale = k.quantize_per_token(x.reshape(-1, head_dim))
    by_head = scale.view(batch, tokens, heads).transpose(1, 2).contiguous()
    return codes.view(x.shape).transpose(1, 2), by_head


def _image_codes(
    value: torch.Tensor, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [B, H, T, D], and their scale [B, H], so that no image depends on its batch.

    Padding has no say in the scale: masked values may clip, their probability is 0.
    """
    absmax = value.abs().amax(3)  # [B, T, H]
    if key_mask is not None:
        absmax = absmax.masked_fill(~key_mask[..., None], 0)
    scale = k.symmetric_scale(absmax.amax(1))
    return k.quantize_symmetric(value, scale[:, None, :, None]).transpose(1, 2), scale


def _static_codes(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes int8 [B, H, T, D] of x [B, T, H, D] with one scale per head."""
    heads, head_dim = x.shape[2:]
    codes = k.quantize_static(x.reshape(-1, heads * head_dim), scale)
    return codes.view(x.shape).transpose(1, 2)

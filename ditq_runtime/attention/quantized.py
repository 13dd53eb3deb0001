"""QuantAttention: the two products of an attention in low bits, between any projections.

It holds the calibrated scales and knows neither projections nor diffusers, so every family may use it; what a class
of diffusers does around it stands in `attention_processor.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

import ditq_kernels as k
from ditq_runtime.format.attention import AttentionFormat
from ditq_runtime.layers import check_nan
from ditq_runtime.layers.pinned import Pinned

Heads: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # codes [B, H, T, D] and their scale
# [B, T, H, D] of each stream, and arguments of `quantize_heads`: norm, rotation
Streams: TypeAlias = Sequence[tuple[torch.Tensor, dict[str, Any]]]


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
        query: torch.Tensor | Streams,
        key: torch.Tensor | Streams,
        value: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        **out: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [B, Tq, H, D] fp32 | fp16 | bf16, after norms and rotary embedding; or those of one stream after
                another, each with what `ditq_kernels.quantize_heads` does to it before it is quantized.
            key: [B, Tk, H, D], the same.
            value: [B, Tk, H, D].
            key_mask: [B, Tk] bool, True where a key is attended.
            out: `QuantLinear.static_input` of the layer behind, for int8 codes.

        Returns:
            [B, Tq, H, D] in the dtype of the values, or int8 codes.
        """
        heads = self._heads("q", query), self._heads("k", key)
        if self.format.values == "bf16":
            values: torch.Tensor | Heads = _bf16(value)
        elif self.format.scales == "token":
            values = _image_codes(value, key_mask)
        else:
            values = self._heads("v", value)
        return _attend(*heads, values, key_mask, self.softmax_scale, value.dtype, **out)

    def _heads(self, operand: str, x: torch.Tensor | Streams) -> Heads:
        """Codes [B, H, T, D] of all streams of `q`, `k` or `v`, and their scale, which static formats hold."""
        streams: Streams = [(x, {})] if isinstance(x, torch.Tensor) else x
        scale = None if self.format.scales == "token" else self._parameters[f"{operand}_scale"]
        if check_nan.ON and scale is not None:
            for part, _ in streams:
                check_nan.refuse_nan(part, f"{operand} of an attention")
        made = [k.quantize_heads(part, scale=scale, **before) for part, before in streams]
        codes, scales = zip(*made, strict=True)
        if len(made) == 1:
            return codes[0], scales[0] if scale is None else scale
        return torch.cat(codes, 2), torch.cat(scales, 2) if scale is None else scale

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
        held: Any = self._parameters
        scales = held["q_scale"], held["k_scale"], held["v_scale"]
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
) -> torch.Tensor:
    """Attend with scales of what is there: one per token and head of Q and K, one per image and head of int8 V.

    Keys lose their mean first, which softmax does not see and scales do (SageAttention, arXiv:2410.02367).

    Args:
        query: as in `QuantAttention.forward`, like all but the next two.
        key: the same.
        value: the same.
        key_mask: the same.
        values: `int8` or `bf16`.
        softmax_scale: multiplies the logits.

    Returns:
        The same.
    """
    made = _bf16(value) if values == "bf16" else _image_codes(value, key_mask)
    heads = k.quantize_heads(query), k.quantize_heads(key, shift=_mean(key, key_mask))
    return _attend(*heads, made, key_mask, softmax_scale, query.dtype)


def _attend(
    query: Heads,
    key: Heads,
    value: torch.Tensor | Heads,
    key_mask: torch.Tensor | None,
    softmax_scale: float,
    dtype: torch.dtype,
    **out: Any,
) -> torch.Tensor:
    """[B, Tq, H, D] of Q, K, V [B, H, T, D] with their scales; V alone is bf16."""
    rest = out or {"out_dtype": dtype}
    rest |= {"softmax_scale": softmax_scale, "key_mask": key_mask}
    if isinstance(value, torch.Tensor):
        made = k.attention_qk_int8_pv_bf16(query[0], key[0], value, query[1], key[1], **rest)
    else:
        codes, scale = value
        made = k.attention_qk_int8_pv_int8(query[0], key[0], codes, query[1], key[1], scale, **rest)
    return made.transpose(1, 2)


def _mean(key: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Fp32 [B, H, D] of keys [B, T, H, D], of those that are attended: no image depends on its padding."""
    if key_mask is None:
        return key.mean(1, dtype=torch.float32)
    share = key_mask / key_mask.sum(1, keepdim=True).clamp_min(1)
    return (key.float() * share[..., None, None]).sum(1)


def _bf16(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16).transpose(1, 2)


def _image_codes(
    value: torch.Tensor, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [B, H, T, D], and their scale [B, H], so that no image depends on its batch.

    Padding has no say in the scale: masked values may clip, their probability is 0.
    """
    if key_mask is None:
        absmax = torch.linalg.vector_norm(value, torch.inf, (1, 3))  # [B, H]
    else:
        of_tokens = torch.linalg.vector_norm(value, torch.inf, 3)
        absmax = of_tokens.masked_fill(~key_mask[..., None], 0).amax(1)
    scale = k.symmetric_scale(absmax)
    return k.quantize_heads(value, scale=scale)[0], scale

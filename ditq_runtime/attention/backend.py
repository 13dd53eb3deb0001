"""Quantized attention for models whose processors ask diffusers' attention dispatcher: Flux, Qwen, Wan, LTX and on.

The dispatcher hands a backend tensors and no module, so every scale is computed from them: nothing is calibrated, and
nothing is stored. `dispatcher` adds the names.

    backend name    scores      values
    ditq_int8       int8        int8
    ditq_bf16       int8        bf16

`set_attention_backend` of diffusers takes these names too, but makes them the default of every model in the process;
`ditq.configure(model, attention=...)` sets the processors of one model.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from ditq_runtime.attention.dispatcher import BACKENDS, SWITCH
from ditq_runtime.attention.processor import key_mask_of
from ditq_runtime.attention.quantized import attend_per_token
from ditq_runtime.format.attention import VALUES

CHOICES = ("auto", "native", *VALUES)
NATIVE = "take configure(attention='native') for it"


def processors_to_choose(model: nn.Module, choice: str) -> list[Any]:
    """The processors of a model that a choice of `CHOICES` sets: those that ask the dispatcher; none for `auto`.

    Raises:
        ValueError: an unknown choice, or one of ours for a model without such attention.
    """
    if choice not in CHOICES:
        raise ValueError(
            f"configure: attention must be one of {', '.join(CHOICES)}, got {choice!r}"
        )
    if choice == "auto":
        return []
    processors = [getattr(module, "processor", None) for module in model.modules()]
    asking = [processor for processor in processors if hasattr(processor, SWITCH)]
    if choice in VALUES and not asking:
        raise ValueError(
            f"configure: attention={choice!r} is not possible, no attention of {type(model).__name__} asks diffusers' "
            f"dispatcher; convert the model with --attention {choice}, or take attention='auto'"
        )
    return asking


def chosen_attentions(model: nn.Module) -> list[str]:
    """The attention modules of a model whose processors name one of our backends."""
    return [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "processor", None), SWITCH, None) in BACKENDS
    ]


def choose_attention(processors: list[Any], choice: str) -> None:
    """Set processors of `processors_to_choose`: `int8` or `bf16` P and V beside int8 Q and K, or diffusers' own."""
    wanted = AttentionBackendName(f"ditq_{choice}") if choice in VALUES else None
    for processor in processors:
        setattr(processor, SWITCH, wanted)


def attend_or_refuse(
    values: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    asked: dict[str, Any],
) -> torch.Tensor:
    """One attention of the dispatcher: query, key, value [B, T, H, D] to [B, Tq, H, D], in the dtype of the query.

    Raises:
        NotImplementedError: something in `asked` is wanted, or a mask that is not over keys.
    """
    for what, wanted in asked.items():
        if wanted:
            raise NotImplementedError(
                f"attention backend ditq_{values}: this attention wants {what}, which it does not do; {NATIVE}"
            )
    softmax_scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attend_per_token(query, key, value, _key_mask(mask, values, key), values, softmax_scale)


def _key_mask(mask: torch.Tensor | None, values: str, key: torch.Tensor) -> torch.Tensor | None:
    """[B, Tk] bool of a mask over keys, which may have axes of one for heads and queries."""
    if mask is None:
        return None
    batch, keys = key.shape[:2]
    over_keys = mask.shape[-1] == keys and mask.numel() in (keys, batch * keys)
    if not over_keys or mask.shape[0] not in (1, batch):
        raise NotImplementedError(
            f"attention backend ditq_{values}: a mask must be [{batch}, 1, 1, {keys}], over keys, got "
            f"{list(mask.shape)}; {NATIVE}"
        )
    return key_mask_of(mask.reshape(-1, keys).expand(batch, keys), batch, keys)


def runs_flex(model: nn.Module) -> bool:
    """Whether an attention of the model asks for flex attention, by its own choice or the process's."""
    default, _ = _AttentionBackendRegistry.get_active_backend()
    processors = [getattr(module, "processor", None) for module in model.modules()]
    chosen = [getattr(p, SWITCH) or default for p in processors if hasattr(p, SWITCH)]
    return AttentionBackendName.FLEX in map(_name_of, chosen)


def _name_of(backend: Any) -> AttentionBackendName:
    return AttentionBackendName(getattr(backend, "value", backend))

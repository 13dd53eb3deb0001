"""Our names in diffusers' attention dispatcher. What they run is loaded when it first runs: this file is light.

diffusers has no call that adds a backend; its table of names is an `Enum`, which is extended here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from ditq_runtime.format.attention import VALUES

SWITCH = "_attention_backend"  # attribute of every processor that asks the dispatcher
BACKENDS = {f"ditq_{values}": values for values in VALUES}


def register_attention_backends() -> None:
    """Make diffusers know the backends; a second call changes nothing."""
    for name, values in BACKENDS.items():
        if name not in {known.value for known in AttentionBackendName}:
            _AttentionBackendRegistry.register(_new_name(name))(_backend(values))


def values_asked_of(processor: Any) -> str | None:
    """Which of our backends the dispatcher takes for a processor, by type of P and V; None for another backend."""
    asked = _asked_by(processor) if hasattr(processor, SWITCH) else None
    return None if asked is None else BACKENDS.get(AttentionBackendName(asked).value)


def asks_for_torch(processor: Any) -> bool:
    """Whether the dispatcher does for a processor what torch's own attention does, and nothing beside."""
    asked, native = _asked_by(processor), AttentionBackendName.NATIVE
    return (
        (asked is native or asked == native.value)
        and processor._parallel_config is None
        and not _AttentionBackendRegistry._checks_enabled
    )


def _asked_by(processor: Any) -> Any:
    """Its backend; of a processor that names none, what `set_attention_backend` made the default of the process."""
    asked = processor._attention_backend
    return _AttentionBackendRegistry.get_active_backend()[0] if asked is None else asked


def _new_name(name: str) -> AttentionBackendName:
    """A further member of the `Enum`, whose class says it can have none."""
    cls = AttentionBackendName
    member = str.__new__(cls, name)
    member._name_, member._value_ = name.upper(), name
    member.__objclass__ = cls  # type: ignore[attr-defined]
    member._sort_order_ = len(cls)
    cls._member_map_[member._name_] = member
    cls._value2member_map_[name] = member
    cls._member_names_.append(member._name_)
    return member


def _backend(values: str) -> Callable[..., torch.Tensor]:
    """What the dispatcher calls; it reads the names of the parameters."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        """Query, key, value [B, T, H, D] to [B, Tq, H, D], in the dtype of the query."""
        from ditq_runtime.attention.backend import attend_or_refuse

        asked = {
            "dropout": dropout_p,
            "a causal mask": is_causal,
            "fewer key heads than query heads": enable_gqa,
            "tokens split over devices": _parallel_config is not None,
        }
        return attend_or_refuse(values, query, key, value, attn_mask, scale, asked)

    return attend

"""Watches what attentions hand to scaled_dot_product_attention: Q, K and V where the runtime quantizes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ditq_runtime.attention.processor import key_mask_of


class OperandWatch(TorchFunctionMode):
    """Tells the rows of Q, K and V: after norms and rotary embedding, all streams together, without masked keys.

    Attributes:
        unlike: attentions that were called with a mask per query or head, or with a bias, so that they cannot run
            quantized; nothing is told of them.
    """

    def __init__(
        self, attentions: Mapping[str, nn.Module], observe: Callable[[str, torch.Tensor], None]
    ) -> None:
        """Hook nothing before `with`.

        Args:
            attentions: name -> module of diffusers, with a stock processor.
            observe: called with `NAME.q`, `NAME.k`, `NAME.v` and rows [n, H * D], any float dtype.
        """
        super().__init__()
        self._attentions, self._observe = attentions, observe
        self._inside: list[str] = []
        self.unlike: set[str] = set()
        self._hooks = ExitStack()

    def __enter__(self) -> OperandWatch:
        """Install the hooks."""
        for name, attention in self._attentions.items():
            enter = attention.register_forward_pre_hook(self._enter_attention(name))
            self._hooks.enter_context(enter)
            self._hooks.enter_context(attention.register_forward_hook(self._leave_attention))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove the hooks."""
        super().__exit__(*error)
        self._hooks.close()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function; tell the operands of an attention."""
        if func is scaled_dot_product_attention and self._inside:
            self._tell(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _tell(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> None:
        """Query, key, value: [B, H, T, D]; mask: [B, H or 1, 1, Tk], the same for all heads."""
        if attn_mask is not None:
            try:
                attn_mask = key_mask_of(attn_mask[:, 0], len(key), key.shape[2])
            except NotImplementedError:
                self.unlike.add(self._inside[-1])
                return
        for operand, x, mask in (
            ("q", query, None),
            ("k", key, attn_mask),
            ("v", value, attn_mask),
        ):
            rows = x.detach().transpose(1, 2).flatten(2)  # [B, T, H * D]
            rows = rows.flatten(0, 1) if mask is None else rows[mask]
            self._observe(f"{self._inside[-1]}.{operand}", rows)

    def _enter_attention(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self._inside.append(name)

        return enter

    def _leave_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()

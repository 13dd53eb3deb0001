"""The format of an attention: how its two products run. docs/format.md is the prose twin of this file."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from ditq_runtime.format.rules import Rule, check_record

HEADS = "quantize_heads"
CORE = "core"  # name of the child of an attention that holds its scales
VALUES = ("int8", "bf16")
SCALES = ("token", "static")
RULES = {"values": Rule(str, VALUES), "scales": Rule(str, SCALES)}


@dataclass(frozen=True)
class AttentionFormat:
    """How softmax(Q K^T) V runs. Queries and keys are int8 always.

    Attributes:
        values: `int8`: probabilities and values are int8 codes; `bf16`: both are bf16.
        scales: `token`: computed when it runs, one per token and head for Q and K, one per image and head
            for int8 V; `static`: one calibrated scale per head, symmetric.
    """

    values: str
    scales: str

    def __post_init__(self) -> None:
        """Refuse what no op runs."""
        check_record(asdict(self), RULES, "attention format")

    @property
    def all_static(self) -> bool:
        """Queries, keys and values are int8 codes with scales that do not depend on them."""
        return (self.values, self.scales) == ("int8", "static")

    @property
    def ops(self) -> tuple[str, ...]:
        """The `ditq::` ops one forward runs between the projections, in order; a quantizer for each int8 operand.

        Where Q and K come from two streams, each has its own.
        """
        operands = 3 if self.values == "int8" else 2
        return (*[HEADS] * operands, f"attention_qk_int8_pv_{self.values}")

    def tensors(self, heads: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors stored for an attention of H heads: name -> dtype, shape."""
        if self.scales == "token":
            return {}
        names = (
            ("q_scale", "k_scale", "v_scale") if self.values == "int8" else ("q_scale", "k_scale")
        )
        return {name: (torch.float32, (heads,)) for name in names}

    def __str__(self) -> str:
        """`qk int8 pv bf16, token scales`, for tables."""
        return f"qk int8 pv {self.values}, {self.scales} scales"

"""Fused blocks in an execution report: their ops told apart by the weights each one was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ditq_runtime.errors import FallbackError
from ditq_runtime.families.dit_fused import steps
from ditq_runtime.families.dit_fusible import ATTENTION, LINEARS
from ditq_runtime.report_attention import Operation


@dataclass(frozen=True)
class BlockRun:
    """How one block with a fused forward ran.

    Attributes:
        name: module name.
        fused: it ran fused.
        note: why it did not.
    """

    name: str
    fused: bool
    note: str = ""


@dataclass(frozen=True)
class Ran:
    """One operator that ran in a fused block, outside the modules that it calls.

    Attributes:
        operation: what it was.
        owner: full name of the linear whose weights it read; empty for other operators.
    """

    operation: Operation
    owner: str


class FusedBlock:
    """Collects what runs in one fused block."""

    def __init__(self, name: str, block: nn.Module) -> None:
        """Learn its weights by their memory."""
        self.name, self.block, self.ran = name, block, list[Ran]()
        self._owners = {}
        for linear in LINEARS:
            for tensor in ("weight", "lora_down"):
                held = getattr(block.get_submodule(linear), tensor, None)
                if held is not None:
                    self._owners[held.untyped_storage().data_ptr()] = f"{name}.{linear}"

    def note(self, operation: Operation, args: tuple[Any, ...]) -> str:
        """An operator with these arguments runs in the block; returns the linear whose weights it reads, or ''."""
        second, owner = args[1] if len(args) > 1 else None, ""
        if isinstance(second, torch.Tensor) and operation.name.startswith("ditq."):
            owner = self._owners.get(second.untyped_storage().data_ptr(), "")
        self.ran.append(Ran(operation, owner))
        return owner

    def ops_of_linears(self) -> dict[str, list[str]]:
        """Full name of each linear -> the ops of `ditq::` that it took part in.

        Raises:
            FallbackError: anything else ran than the fused forward of the block promises.
        """
        before, after = steps(self.block)
        expected = [*before, *after]
        end = len(self.ran) - len(after)
        ran = [*self.ran[: len(before)], *self.ran[max(end, 0) :]]
        if [r.operation.name for r in ran] != [f"ditq.{op}" for op, _ in expected]:
            raise FallbackError(
                f"{self.name}: fused, expected {_joined(op for op, _ in before)} + attention + "
                f"{_joined(op for op, _ in after)}, but {_joined(r.operation.name for r in self.ran)} ran"
            )
        ops: dict[str, list[str]] = {}
        for (op, linear), step in zip(expected, ran, strict=True):
            name = f"{self.name}.{linear}"
            if step.owner not in ("", name) or (op.startswith(("gemm", "lora")) and not step.owner):
                raise FallbackError(
                    f"{name}: its {op} ran on the weights of {step.owner or 'no linear of the block'}"
                )
            ops.setdefault(name, []).append(op)
        return ops

    @property
    def attention(self) -> tuple[str, list[Operation]]:
        """The attention's full name, and what ran between the projections."""
        before, after = steps(self.block)
        between = self.ran[len(before) : len(self.ran) - len(after)]
        return f"{self.name}.{ATTENTION}", [r.operation for r in between]


def _joined(names: Any) -> str:
    return " + ".join(names) or "nothing"

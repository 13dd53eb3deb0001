"""Fused blocks in an execution report: their ops told apart by the weights each one was given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from ditq_runtime.errors import FallbackError
from ditq_runtime.families.fused import FLOAT_ATTENTION
from ditq_runtime.families.fusible import layout_of
from ditq_runtime.report.attention import Operation


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
        owners: full names of the linears whose weights it read; none for other operators.
    """

    operation: Operation
    owners: tuple[str, ...]


class FusedBlock:
    """Collects what runs in one fused block.

    Attributes:
        bypassed: names inside the block of the linears and attentions that it does not call.
    """

    def __init__(self, name: str, block: nn.Module) -> None:
        """Learn its weights by their memory."""
        self.name, self.block, self.ran = name, block, list[Ran]()
        layout = layout_of(block)
        self.bypassed = (*layout.linears, *layout.attentions)
        self._owners = {}
        for linear in layout.linears:
            for tensor in ("weight", "lora_down"):
                held = getattr(block.get_submodule(linear), tensor, None)
                if held is not None:
                    self._owners[held.untyped_storage().data_ptr()] = f"{name}.{linear}"

    def note(self, operation: Operation, args: tuple[Any, ...]) -> tuple[str, ...]:
        """An operator with these arguments runs in the block; returns the linears whose weights it reads."""
        second = args[1] if operation.name.startswith("ditq.") and len(args) > 1 else None
        weights = second if isinstance(second, list) else [second]
        held = [w.untyped_storage().data_ptr() for w in weights if isinstance(w, torch.Tensor)]
        owners = tuple(self._owners[at] for at in held if at in self._owners)
        self.ran.append(Ran(operation, owners))
        return owners

    def ops_of_linears(self) -> dict[str, list[str]]:
        """Full name of each linear -> the ops of `ditq::` that it took part in.

        Raises:
            FallbackError: anything else ran than the fused forward of the block promises.
        """
        linears = layout_of(self.block).linears
        ops: dict[str, list[str]] = {}
        for op, part, ran in self._matched():
            parts = (part,) if isinstance(part, str) else part
            if parts[0] not in linears:
                continue
            names, owners = tuple(f"{self.name}.{one}" for one in parts), ran[0].owners
            if owners not in ((), names) or (op.startswith(("gemm", "lora")) and not owners):
                raise FallbackError(
                    f"{', '.join(names)}: its {op} ran on the weights of "
                    f"{', '.join(owners) or 'no linear of the block'}"
                )
            for name in names:
                ops.setdefault(name, []).append(op)
        return ops

    def attentions(self) -> dict[str, list[Operation]]:
        """Full name of each attention -> what ran for it between the projections.

        Raises:
            FallbackError: anything else ran than the fused forward of the block promises.
        """
        found: dict[str, list[Operation]] = {}
        for _, part, ran in self._matched():
            if part in layout_of(self.block).attentions:
                found.setdefault(f"{self.name}.{part}", []).extend(r.operation for r in ran)
        return found

    def _matched(self) -> list[tuple[str, str | tuple[str, ...], list[Ran]]]:
        """What ran for each promised step: its op and owners, and one operator, or several for a float attention."""
        expected = layout_of(self.block).steps(self.block)
        matched, left = [], list(self.ran)
        for op, part in expected:
            if op == FLOAT_ATTENTION:
                taken = list(takewhile(lambda r: not r.operation.name.startswith("ditq."), left))
            else:
                taken = [r for r in left[:1] if r.operation.name == f"ditq.{op}"]
            if not taken:
                break
            matched.append((op, part, taken))
            left = left[len(taken) :]
        if left or len(matched) < len(expected):
            raise FallbackError(
                f"{self.name}: fused, expected {_joined(op for op, _ in expected)}, "
                f"but {_joined(r.operation.name for r in self.ran)} ran"
            )
        return matched


def _joined(names: Iterable[str]) -> str:
    return " + ".join(names) or "nothing"

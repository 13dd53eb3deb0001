"""What the compile backend did to each graph of this process."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

KEPT = 64  # graphs that are remembered, the latest

_log = logging.getLogger("ditq.compile")
_graphs: deque[CompiledGraph] = deque(maxlen=KEPT)


@dataclass(frozen=True)
class CompiledGraph:
    """One graph that was compiled.

    Attributes:
        fired: what was rewritten -> how often: the fused op that stands there now, or the op that was shared.
        ops: ops of ditq in the rewritten graph, before Inductor -> how many.
        quantizers_left: quantizers that no pattern took: Inductor fuses those of rows that are not too wide.
        inner: what compiled the rest.
    """

    fired: Mapping[str, int]
    ops: Mapping[str, int]
    quantizers_left: int
    inner: str

    def __str__(self) -> str:
        """One line."""
        return (
            f"{_listed(self.fired) or 'nothing'} rewritten; {_listed(self.ops) or 'no ops'} in the graph, "
            f"{self.quantizers_left} quantizers by themselves; compiled by {self.inner}"
        )


def compile_report() -> list[CompiledGraph]:
    """What `torch.compile(..., backend="ditq")` did in this process: one entry for each graph, the latest last.

    The same lines go to the logger `ditq.compile` at level INFO.

    Returns:
        At most 64 entries; `print` one, or read its attributes.
    """
    return list(_graphs)


def note(graph: CompiledGraph) -> None:
    """Remember what was done to a graph."""
    _graphs.append(graph)
    _log.info("%s", graph)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(counts).most_common())

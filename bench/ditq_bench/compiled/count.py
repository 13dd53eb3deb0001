"""Launches in generated code, and of one block of a model: what one block more adds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import ditq_runtime as ditq
from ditq_bench.compiled.families import Block, arguments, build
from ditq_runtime.speed.backend import compile as backend
from ditq_runtime.speed.backend import functional

KERNEL = re.compile(r"\s*(?:\w+ = )?(triton_\w+?)\.run\(")
EXTERN = re.compile(r"\s*(?:\w+ = )?(?:torch\.ops|extern_kernels)\.([\w.]+?)(?:\.default)?\(")
COUNTS = (2, 3)  # blocks of the models that are compared


@dataclass(frozen=True)
class Way:
    """How a model is compiled.

    Attributes:
        quantized: packed, W8A8 with token scales; else float.
        rewritten: by the passes of the backend, with its settings of Inductor.
        wide: quantizers stay ops, as those of rows that are wider than Inductor fuses.
    """

    quantized: bool = True
    rewritten: bool = True
    wide: bool = False


WAYS = {
    "float": Way(quantized=False, rewritten=False),
    "inductor": Way(rewritten=False),
    "ditq": Way(),
    "ditq wide": Way(wide=True),
}


def launches_of_block(block: Block, way: Way) -> Counter[str]:
    """What a block launches: by `triton` for kernels of Inductor, by operator for others."""
    few, many = (launches(generated(block, count, way)) for count in COUNTS)
    return many - few


def generated(block: Block, count: int, way: Way) -> str:
    """Inductor's code for a model with `count` blocks; after `inductor.install`."""
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._inductor.decomposition import select_decomp_table

    from ditq_kernels._triton.offline import inductor

    config = ditq.DitqConfig(weights="w8") if way.quantized else None
    model, graphs = build(block, count, config), list[fx.GraphModule]()
    table = {**select_decomp_table()}
    if way.rewritten and not way.wide:
        table |= functional.decompositions()

    class TracedError(Exception):
        pass

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        raise TracedError

    def trace(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        if way.rewritten:
            backend.rewrite(graph)
        return aot_module_simplified(
            graph, inputs, fw_compiler=keep, inference_compiler=keep, decompositions=table
        )

    torch.compiler.reset()
    try:
        with torch.no_grad():
            torch.compile(model, fullgraph=True, backend=trace)(**arguments(block))
    except Exception:
        if not graphs:
            raise
    return inductor.source(graphs[-1], backend.CONFIG if way.rewritten else {})


def launches(source: str) -> Counter[str]:
    """The kernels and operators that the generated function `call` runs."""
    found: Counter[str] = Counter()
    for line in source[source.rindex("def call(") :].splitlines():
        if KERNEL.match(line):
            found["triton"] += 1
        elif match := EXTERN.match(line):
            found[match[1]] += 1
    return found

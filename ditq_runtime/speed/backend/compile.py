"""The backend: rewrite the graph of Dynamo, then hand it to Inductor.

Dynamo's graph is where GELU, layer norms and our ops are single nodes; Inductor's is too late. `PASSES` is all that is
done, in order: `share` first, so that a pattern finds one quantizer where an attention has three; `fuse_many`
last, which takes the GEMMs that are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ditq_runtime.speed.backend import functional
from ditq_runtime.speed.backend.adaln import fuse_adaln
from ditq_runtime.speed.backend.gelu import fuse_gelu
from ditq_runtime.speed.backend.graph import Graph
from ditq_runtime.speed.backend.many import fuse_many
from ditq_runtime.speed.backend.parts import PER_TOKEN, STATIC
from ditq_runtime.speed.backend.report import CompiledGraph, note
from ditq_runtime.speed.backend.residual import fuse_residual
from ditq_runtime.speed.backend.share import share

PASSES: tuple[Callable[[Graph], None], ...] = (
    share, fuse_residual, fuse_adaln, fuse_gelu, share, fuse_many,
)  # fmt: skip
INDUCTOR = "inductor"
# what quantizers need of Inductor: the roundings of eager half precision (a fused chain skips them, which moves codes),
# division as IEEE says; and kernels that wait for nothing of each other in one launch
CONFIG = {
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
    "combo_kernels": True,
}


def ditq_backend(
    module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph; `torch.compile(model, backend="ditq")` calls it.

    Args:
        module: the graph of Dynamo; it is changed.
        inputs: as a backend gets them.
        mode: a mode of Inductor, such as "reduce-overhead".
        options: settings of Inductor, which go before ours; "inner" names another backend for the rewritten graph,
            such as "aot_eager".

    Returns:
        What runs the graph.
    """
    settings = dict(options or {})
    inner = settings.pop("inner", INDUCTOR)
    rewrite(module, inner)
    if inner != INDUCTOR:
        return torch._dynamo.lookup_backend(inner)(module, list(inputs))
    return _by_inductor(module, inputs, mode, settings)


def rewrite(module: fx.GraphModule, inner: str = INDUCTOR) -> CompiledGraph:
    """Run all passes over a graph in place, and remember what they did."""
    fired: Counter[str] = Counter()
    for one in PASSES:
        graph = Graph(module, fired)
        one(graph)
        graph.finish()
    ops = Counter(
        node.target._opname
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "ditq"
    )
    left = sum(node.target in (PER_TOKEN, STATIC) for node in module.graph.nodes)
    found = CompiledGraph(dict(fired), dict(ops), left, inner)
    note(found)
    return found


def _by_inductor(
    module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    mode: str | None,
    settings: dict[str, Any],
) -> Callable[..., Any]:
    from torch._functorch import config as functorch_config
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    known = config.get_config_copy()
    ours = {name: value for name, value in CONFIG.items() if name in known}
    asked = list_mode_options(mode) if mode else {}
    table = {**select_decomp_table(), **functional.decompositions()}
    # its key does not see our table: a graph that was compiled with another one would be taken
    with functorch_config.patch(enable_autograd_cache=False):
        compiled: Any = compile_fx(
            module, inputs, config_patches={**ours, **asked, **settings}, decompositions=table
        )
    return compiled

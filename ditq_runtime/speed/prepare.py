"""Make a pipeline ready for many samples: compile what is compiled on first use, hoist what repeats."""

from __future__ import annotations

from typing import Any

import torch

from ditq_runtime.families import family_of
from ditq_runtime.families.adaln import HOISTS
from ditq_runtime.families.family import Family
from ditq_runtime.families.fusible import fusible_blocks, why_not
from ditq_runtime.host.configure import configure
from ditq_runtime.speed.cuda_graph import GraphedForward
from ditq_runtime.speed.hoist import SCALE, Hoist


class Prepared:
    """What `prepare` installed; `print` it.

    Attributes:
        hoist: the hoisted modulation; None where there is none.
        graph: the captured forward; None without.
        compiled: the repeated blocks were compiled with the backend `ditq`.
        reasons: why each of the three was taken or left: name -> sentence.
    """

    def __init__(self, model: Any, compiled: bool, reasons: dict[str, str]) -> None:
        """Nothing is installed yet but what is compiled."""
        self.hoist: Hoist | None = None
        self.graph: GraphedForward | None = None
        self.compiled, self.reasons, self._model = compiled, reasons, model

    def undo(self) -> None:
        """Take everything out again."""
        for part in (self.graph, self.hoist):
            if part is not None:
                part.remove()
        self.hoist = self.graph = None
        if self.compiled:
            for module in self._model.modules():
                module._compiled_call_impl = None
        self.compiled = False

    def __str__(self) -> str:
        """A line each, and for graphs what was measured so far."""
        lines = [f"{name}: {reason}" for name, reason in self.reasons.items()]
        measured = [] if self.graph is None else self.graph.measured
        return "\n".join([*lines, *(f"  {found}" for found in measured)])


def prepare(pipe: Any, cuda_graph: bool | None = None, compile: bool | None = None) -> Prepared:
    """Warm up, and install what makes sampling faster; without arguments what helps here is chosen.

    Hoisting: modulation is computed once per sampling run, for all steps (DiT, PixArt, SD3, Flux). It costs 4 bytes
    times blocks, steps, samples (twice with guidance) and 6 times the width: 310 MB for DiT-XL/2 at 50 steps and 4
    guided samples. Rounding may differ in the last bit from a step-by-step run, because the rows are summed in another
    batch. Where an adapter reaches modulation, or an embedder, it is computed at every step, as without.

    CUDA graphs: on a CUDA GPU each new set of input shapes is captured, and timed with and without: small batches wait
    for Python, large ones do not. The graph is kept where it takes at most 97 % of the time.

    Compilation: the repeated blocks, with the backend `ditq`, on a CUDA GPU for families that have neither fused blocks
    nor hoisted modulation. The first sample then takes minutes.

    Args:
        pipe: a pipeline with a packed transformer, on the device it will run on. Not compiled with torch.compile.
        cuda_graph: replay the transformer as one CUDA graph per set of input shapes; True: always, which needs a
            CUDA GPU; False: never; None: where it was measured to help.
        compile: compile the repeated blocks; True: always, then nothing is hoisted; None: as above.

    Returns:
        A handle; `print` says what was done and why, `undo()` takes everything out.

    Raises:
        ValueError: the transformer is not packed, is prepared already, or `cuda_graph=True` without a CUDA GPU. Nothing
            is changed then.
    """
    model = getattr(pipe, "transformer", None)
    if model is None:
        raise ValueError(
            f"prepare: {type(pipe).__name__} has no transformer; give a pipeline, not a model"
        )
    configure(model)
    device = next(model.parameters()).device
    if cuda_graph and device.type != "cuda":
        raise ValueError(
            f"prepare: cuda_graph=True needs a CUDA GPU, and the transformer is on {device}; move the pipeline with "
            '.to("cuda"), or leave cuda_graph=False'
        )
    if _is_prepared(pipe):
        raise ValueError("prepare: this pipeline is prepared already; undo() the first one")
    family = family_of(type(model).__name__)
    wanted = _chosen(model, family, device, cuda_graph, compile)
    done = Prepared(model, wanted["compile"][0], {name: why for name, (_, why) in wanted.items()})
    if done.compiled:
        model.compile_repeated_blocks(backend="ditq", fullgraph=True)
    elif family.example_inputs is not None:  # loads and compiles kernels
        with torch.no_grad():
            model(**family.example_inputs(model))
    if wanted["hoist"][0] and family.hoistable is not None:
        done.hoist = Hoist(pipe, family.hoistable)
    if wanted["graph"][0]:
        done.graph = GraphedForward(model, always=bool(cuda_graph))
    return done


def _chosen(
    model: Any, family: Family, device: torch.device, graph: bool | None, compile: bool | None
) -> dict[str, tuple[bool, str]]:
    """What to install, and why or why not."""
    on_gpu = device.type == "cuda"
    fused = [block for block in fusible_blocks(model).values() if not why_not(block)]
    hoists, compiles = family.hoistable is not None and not compile, bool(compile)
    if not family.hoistable:
        hoist = "no, this family has no modulation that is known to depend on the timestep alone"
    else:
        hoist = "yes, modulation is computed once a run" if hoists else "no, blocks are compiled"
    if compile is None and on_gpu and not fused and not hoists:
        compiles, why = True, "yes, nothing is fused otherwise; the first sample takes minutes"
    elif compile is None:
        why = f"no, {len(fused)} blocks run fused" if fused else "no, it was not asked for"
    else:
        why = "yes, as asked" if compiles else "no, as asked"
    graphs = on_gpu if graph is None else graph
    if graph is not None:
        told = "yes, as asked" if graphs else "no, as asked"
    else:
        told = "where it is measured to help" if graphs else f"no, the transformer is on {device}"
    return {"hoist": (hoists, hoist), "compile": (compiles, why), "graph": (graphs, told)}


def _is_prepared(pipe: Any) -> bool:
    """A hoist of the same pipeline's scheduler, or a graph, is in place."""
    model = pipe.transformer
    replays = getattr(vars(model).get("forward"), "__self__", None)
    schedulers = [hoist.scheduler for hoist in getattr(model, HOISTS, ())]
    return (
        isinstance(replays, GraphedForward)
        or SCALE in vars(pipe.scheduler)
        or any(one is pipe.scheduler for one in schedulers)
    )

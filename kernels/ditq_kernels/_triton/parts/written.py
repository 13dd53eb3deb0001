"""A kept plan as a Python function that is written for it: taking values out of tuples would cost what a launch does.

Such as, for a kernel of two tensors that leaves a third:

    def run(arguments, tensors):
        if elsewhere():
            return slowly(arguments)
        t0, t1, = tensors
        a0 = t0.data_ptr()
        a1 = t1.data_ptr()
        if (a0 | a1) & 15:
            return None
        stream = stream_of(0)
        m2 = take((32, 64), (64, 1), dtype2)
        launch0(4, 1, 1, stream, function0, 0, 0, metadata0, ..., (a0, a1, m2.data_ptr(), f3, f4, ))
        return m2

Only numbers get into the text; all else goes by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch._C._dynamo.guards import (  # type: ignore[attr-defined]
    _empty_strided_cpu,
    _empty_strided_cuda,
)
from triton import knobs

from ditq_kernels.launch.plans import FunctionPlan

if TYPE_CHECKING:
    from ditq_kernels._triton.parts.replay import LaunchPlan

TAKE = {"cpu": _empty_strided_cpu, "cuda": _empty_strided_cuda}  # on the current device


def runner_of(plan: LaunchPlan) -> Callable[[Any, tuple[torch.Tensor, ...]], Any]:
    """The function of a plan: of a call's arguments and its tensors in order."""
    lines, names = _written(plan)
    text = "def run(arguments, tensors):\n" + "".join(f"    {line}\n" for line in lines)
    exec(text, names)
    found: Callable[[Any, tuple[torch.Tensor, ...]], Any] = names["run"]
    return found


def _written(plan: LaunchPlan) -> tuple[list[str], dict[str, Any]]:
    """Lines of its body, and what they name."""
    index = plan.device.index
    names: dict[str, Any] = {
        "elsewhere": _somebody_listens if index is None else _elsewhere(index),
        "slowly": FunctionPlan(plan.op),
        "stream_of": triton.runtime.driver.active.get_current_stream,
        "take": TAKE[plan.device.type],
    }
    tensors = ", ".join(f"t{i:d}" for i in plan.aligned)
    lines = ["if elsewhere():", "    return slowly(arguments)", f"{tensors}, = tensors"]
    lines += [f"a{i:d} = t{i:d}.data_ptr()" for i in plan.aligned]
    aligned = " | ".join(f"a{i:d}" for i, whole in plan.aligned.items() if whole)
    others = [f"not a{i:d} & 15" for i, whole in plan.aligned.items() if not whole]
    for condition in ([f"({aligned}) & 15"] if aligned else []) + others:
        lines += [f"if {condition}:", "    return None"]
    lines.append(f"stream = stream_of({index or 0:d})")
    for i, memory in enumerate(plan.memory, plan.count):
        lines.append(_taking(i, memory, plan.device, names))
    for i, step in enumerate(plan.steps):
        given = "".join(_expression(place, plan, names) + ", " for place in step.places)
        lines.append(_launching(i, step, given, names))
    results = [_seen(i, plan.count + out.memory, out.view, names) for i, out in enumerate(plan.outs)]
    lines.append(f"return {results[0]}" if plan.single else f"return ({', '.join(results)},)")
    return lines, names


def _launching(i: int, step: Any, given: str, names: dict[str, Any]) -> str:
    """A launch, past Triton's Python where it would find nothing to do: memory for the kernel to scratch in."""
    kernel, launcher = step.kernel, step.kernel.run
    names |= {f"function{i}": kernel.function, f"metadata{i}": kernel.packed_metadata}
    grid = "{:d}, {:d}, {:d}".format(*step.grid)
    if not _is_bare(launcher):
        names[f"launch{i}"] = launcher
        return f"launch{i}({grid}, stream, function{i}, metadata{i}, None, None, None, {given})"
    names |= {f"launch{i}": launcher.launch, f"kinds{i}": launcher.arg_annotations}
    names[f"layout{i}"] = launcher.kernel_signature
    options = f"{launcher.launch_cooperative_grid:d}, {launcher.launch_pdl:d}, metadata{i}"
    nothing = "None, None, None, None, None"  # metadata and hooks of a profiler, two memories
    return f"launch{i}({grid}, stream, function{i}, {options}, {nothing}, kinds{i}, layout{i}, ({given}))"


def _is_bare(launcher: Any) -> bool:
    """Whether Triton's launcher (3.7 to 3.9) does nothing but call C for this kernel."""
    return (
        hasattr(launcher, "kernel_signature")
        and launcher.global_scratch_size == launcher.profile_scratch_size == 0
        and not getattr(launcher, "gsan_enabled", False)
    )


def _taking(i: int, memory: Any, device: torch.device, names: dict[str, Any]) -> str:
    """Memory; without elements it is taken once: no public op hands it on."""
    names[f"dtype{i}"] = memory.dtype
    if not all(memory.shape):
        names[f"none{i}"] = torch.empty(memory.shape, dtype=memory.dtype, device=device)
        return f"m{i:d} = none{i:d}"
    return f"m{i:d} = take({_numbers(memory.shape)}, {_numbers(memory.stride)}, dtype{i:d})"


def _numbers(values: tuple[int, ...]) -> str:
    return "(" + "".join(f"{value:d}, " for value in values) + ")"


def _expression(place: Any, plan: LaunchPlan, names: dict[str, Any]) -> str:
    """An argument of a launch: an address, or a value that is the same each time."""
    if isinstance(place, tuple):
        return "(" + "".join(_expression(one, plan, names) + ", " for one in place) + ")"
    if place in plan.aligned:
        return f"a{place:d}"
    if place < plan.count + len(plan.memory):
        return f"m{place:d}.data_ptr()"
    names[f"f{place:d}"] = plan.fixed[place - plan.count - len(plan.memory)]
    return f"f{place:d}"


def _seen(i: int, memory: int, view: Any, names: dict[str, Any]) -> str:
    """A result."""
    names[f"view{i}"] = view
    return f"m{memory:d}" if view is None else f"m{memory:d}.as_strided(*view{i})"


def _somebody_listens() -> bool:
    """A profiler of Triton has hooks on launches: it gets them from Triton's own way to launch."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def _elsewhere(index: int) -> Callable[[], bool]:
    """Somebody listens, or another GPU is current."""
    return lambda: torch._C._cuda_getDevice() != index or _somebody_listens()

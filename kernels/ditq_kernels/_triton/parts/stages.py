"""Leave one compiler pass out of our kernels, where a Triton release makes int8 products slow with it.

Since 3.8 the pass `prefetch` also takes the int8 products of sm_8x: it holds a whole operand in registers,
which then spill. gemm_w8a8 128x256x64 becomes 785 loop instructions with 384 spills on sm_80, instead
of 122 without spills (3.6, 3.7; and 3.8, 3.9 without the pass). Triton's inspection hook replaces a stage of
the compiler. It is set once for the process and acts only inside `our_passes`, in the same thread, so
that other people's kernels compile as before; a hook that somebody else has set keeps working.
"""

import threading
import types
from typing import Any

import triton
from triton import knobs

from ditq_kernels.launch.gpus import release_of

FIRST_WITH_PREFETCH = (3, 8)
NEEDED = release_of(triton.__version__) >= FIRST_WITH_PREFETCH
KEY = "ditq: no prefetch"

_compiling = threading.local()


class our_passes:
    """Compile and look up kernels with our passes while this is entered; does nothing if Triton needs none."""

    def __enter__(self) -> None:
        """Install the hook if nobody has, and claim this thread's kernels."""
        if NEEDED and not isinstance(knobs.runtime.add_stages_inspection_hook, StagesHook):
            knobs.runtime.add_stages_inspection_hook = StagesHook(
                knobs.runtime.add_stages_inspection_hook
            )
        _compiling.depth = getattr(_compiling, "depth", 0) + 1

    def __exit__(self, *_: object) -> None:
        """Give the thread back."""
        _compiling.depth -= 1


class StagesHook:
    """Triton calls it without arguments for a part of its cache keys, with arguments to change stages."""

    def __init__(self, previous: Any) -> None:
        """Previous: the hook that was set before, or None; it is called first."""
        self.previous = previous

    def __call__(self, *arguments: Any) -> tuple[str, str] | None:
        """(text for the disk key, text for the memory key), or None after changing the stages."""
        before = self.previous(*arguments) if self.previous is not None else ("", "")
        ours = getattr(_compiling, "depth", 0) > 0
        if not arguments:
            disk, memory = before
            return (disk + KEY, f"{memory}{KEY!r}") if ours else before
        backend, stages, options, _, capability = arguments
        if ours and capability // 10 == 8:
            make_ttgir = without_prefetch(backend.make_ttgir)
            stages["ttgir"] = lambda module, metadata: make_ttgir(
                module, metadata, options, capability
            )
        return None


def without_prefetch(make_ttgir: Any) -> Any:
    """A copy of Triton's stage that sees a list of passes in which `add_prefetch` adds nothing.

    Raises:
        NotImplementedError: this Triton release builds the stage in another way.
    """
    passes = make_ttgir.__globals__.get("passes")
    if passes is None or "add_prefetch" not in make_ttgir.__code__.co_names:
        raise NotImplementedError(
            f"ditq_kernels: cannot leave the prefetch pass out of Triton {triton.__version__}, and int8 "
            "kernels on sm_8x are slow with it; install triton>=3.6,<3.10"
        )
    known = dict(vars(passes.ttgpuir)) | {"add_prefetch": lambda manager: None}
    ours = dict(vars(passes)) | {"ttgpuir": types.SimpleNamespace(**known)}
    names = make_ttgir.__globals__ | {"passes": types.SimpleNamespace(**ours)}
    return types.FunctionType(
        make_ttgir.__code__, names, make_ttgir.__name__, make_ttgir.__defaults__, make_ttgir.__closure__
    )

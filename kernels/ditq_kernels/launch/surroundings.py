"""What surrounds a call and must not change its integers, or must see it: autocast, modes, profilers, transforms."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch._C import (
    _functorch,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.compiler import is_compiling

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
for _device in ("CUDA", "XPU", "MPS", "HPU", "IPU", "PrivateUse1"):
    _AUTOCAST |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{_device}"))
_NOTHING = contextlib.nullcontext()


def plain() -> bool:
    """Nobody looks on or takes part: no compiler, tracer, mode, profiler, autocast or functional transform.

    Each question costs 30 to 75 ns.
    """
    return not (
        is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _profiler_enabled()
        or _is_any_autocast_enabled()
        or _get_tracing_state() is not None
        or _functorch.peek_interpreter_stack() is not None
    )


def undisturbed() -> AbstractContextManager:
    """Run an implementation without autocast: it would round the sums of the definition to half precision."""
    if _is_any_autocast_enabled():
        return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)
    return _NOTHING

"""Weights in the order a kernel reads, made at the first use of a layer and kept.

The cache holds weak references: an entry dies with the first of its tensors. It is valid while all are
the same objects at the same addresses with the same torch version counters, so an in-place update or
an offload to the CPU and back makes a new copy. Two limits: writes through `.data` bypass the version
counter, as they bypass autograd; tensors created under `torch.inference_mode` have no counter and are
prepared at every call.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ditq_kernels.launch import recording


@dataclass(frozen=True)
class _Entry:
    prepare: Callable[..., Any]  # interpreted, kernels and the CPU backend meet the same tensors
    parts: tuple[weakref.ref, ...]
    stamps: tuple[tuple[int, int], ...]
    prepared: Any


_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def prepared(op: str, parts: tuple[torch.Tensor, ...], prepare: Callable[..., Any]) -> Any:
    """`prepare(*parts)`, from the cache if none of the parts has changed.

    Raises:
        RuntimeError: they are not prepared yet and a CUDA graph is being captured.
    """
    run = recording.active()
    if run is None:
        return _found(op, parts, prepare)
    with run.paused():
        found = _found(op, parts, prepare)
    run.prepared.append((parts, found))
    return found


def _found(op: str, parts: tuple[torch.Tensor, ...], prepare: Callable[..., Any]) -> Any:
    key = parts[0]
    entry = _cache.get(key)
    stamps = None if any(part.is_inference() for part in parts) else _stamps(parts)
    if (
        entry is not None
        and entry.prepare is prepare
        and entry.stamps == stamps
        and _same_objects(entry.parts, parts)
    ):
        return entry.prepared
    if key.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: weights must be prepared before a CUDA graph is captured, got a first use "
            "(or weights changed since, or made under torch.inference_mode); call the op once before"
        )
    made = prepare(*parts)
    if stamps is not None:
        if key.is_cuda:
            torch.cuda.current_stream(key.device).synchronize()  # other streams may read it next
        _cache[key] = _Entry(prepare, tuple(weakref.ref(part) for part in parts), stamps, made)
    return made


def _stamps(parts: tuple[torch.Tensor, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((part.data_ptr(), part._version) for part in parts)


def _same_objects(references: tuple[weakref.ref, ...], parts: tuple[torch.Tensor, ...]) -> bool:
    if len(references) != len(parts):
        return False
    return all(reference() is part for reference, part in zip(references, parts, strict=True))

"""Weights in the order a kernel reads, made at the first use of weights that are in another, and kept beside them.

Layers hold theirs in that order already (`codes.arranged`): this is for weights in the file's order. The cache holds
weak references: an entry dies with the first of its tensors. It is valid while all are the same objects at the same
addresses with the same torch version counters, so an in-place update or an offload to the CPU and back makes a new
copy. Two limits: writes through `.data` bypass the version counter, as they bypass autograd; tensors created under
`torch.inference_mode` have no counter and are prepared at every call. Nothing waits for a GPU: another stream than the
one that made a copy waits for that stream.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class _Entry:
    prepare: Callable[..., Any]  # interpreted, kernels and the CPU backend meet the same tensors
    parts: tuple[weakref.ref, ...]
    stamps: tuple[tuple[int, int], ...]
    prepared: Any
    stream: Any  # that made it; None on a CPU


_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_kept = False  # see `keep_copies`


def keep_copies(wanted: bool) -> None:
    """Whether ops on a CPU may keep a second form of weights that is multiplied faster; for this process, off at first.

    Int4 is kept as int8 beside itself where the processor has int8 dot products: twice its bytes more. Where it
    has not, all integer weights are kept in oneDNN's order, up to 1.75 times their int8 size; without, products run in
    fp32, as exact and slower. Copies that were made are freed when this is switched off.
    """
    global _kept
    _kept = wanted
    if not wanted:
        for key in [key for key in _cache if key.device.type == "cpu"]:
            del _cache[key]


@contextlib.contextmanager
def copies_kept() -> Iterator[None]:
    """`keep_copies(True)` inside; what was made stays for the next time."""
    global _kept
    before, _kept = _kept, True
    try:
        yield
    finally:
        _kept = before


def keeps_copies() -> bool:
    """What `keep_copies` was told last."""
    return _kept


def copied_bytes() -> int:
    """Bytes of all second forms of weights on CPUs that this process holds."""
    held = [entry.prepared for key, entry in _cache.items() if key.device.type == "cpu"]
    tensors = tree_leaves([getattr(one, "parts", one) for one in held])
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def prepared(op: str, parts: tuple[torch.Tensor, ...], prepare: Callable[..., Any]) -> Any:
    """`prepare(*parts)`, from the cache if none of the parts has changed.

    Raises:
        RuntimeError: they are not prepared yet and a CUDA graph is being captured.
    """
    key = parts[0]
    entry = _cache.get(key)
    stamps = None if any(part.is_inference() for part in parts) else _stamps(parts)
    if (
        entry is not None
        and entry.prepare is prepare
        and entry.stamps == stamps
        and _same_objects(entry.parts, parts)
    ):
        _wait_for(entry.stream, key.device)
        return entry.prepared
    if key.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: weights must be prepared before a CUDA graph is captured, got a first use "
            "(or weights changed since, or made under torch.inference_mode); call the op once before"
        )
    made = prepare(*parts)
    if stamps is not None:
        references = tuple(weakref.ref(part) for part in parts)
        _cache[key] = _Entry(prepare, references, stamps, made, _stream_of(key.device))
    return made


def _stream_of(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _wait_for(maker: Any, device: torch.device) -> None:
    """Let the current stream wait for another's work; a capture began after all streams were waited for."""
    if maker is None or torch.cuda.is_current_stream_capturing():
        return
    now = _stream_of(device)
    if now != maker:
        now.wait_stream(maker)


def _stamps(parts: tuple[torch.Tensor, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((part.data_ptr(), part._version) for part in parts)


def _same_objects(references: tuple[weakref.ref, ...], parts: tuple[torch.Tensor, ...]) -> bool:
    if len(references) != len(parts):
        return False
    return all(reference() is part for reference, part in zip(references, parts, strict=True))

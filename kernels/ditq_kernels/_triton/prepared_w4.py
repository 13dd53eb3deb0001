"""Int4 weights in the order the kernel reads, made at the first use of a layer and kept.

The file's nibble order would need a byte shuffle per fragment (2.5x the loop instructions on
sm_80), so bytes are permuted once (`packing.split_for_kernel`) and group metadata is transposed into
one word per group and channel. The copy is as large as the packed weights and lives on their device.

The cache holds weak references: an entry dies with its packed tensor. It is valid while packed,
group_scale and group_offset are the same objects at the same addresses with the same torch version
counters, so an in-place update or an offload to the CPU and back makes a new copy. Two limits:
writes through `.data` bypass the version counter, as they bypass autograd; tensors created under
`torch.inference_mode` have no counter and are prepared at every call.
"""

import weakref
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ditq_kernels import packing

WIDE_UNIT, NARROW_UNIT = 128, 64


@dataclass(frozen=True)
class PreparedW4:
    """Progressive int4 weights in kernel order."""

    split: torch.Tensor  # [N, padded K / 2] uint8, see packing.split_for_kernel
    groups: torch.Tensor  # [J, N] int32: group_scale | (group_offset + 128) << 8
    unit: int  # inputs per unit; each half of a unit lies in one group


@dataclass(frozen=True)
class _Entry:
    parts: tuple[weakref.ref, ...]
    stamps: tuple[tuple[int, int], ...]
    prepared: PreparedW4


_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def kernel_unit(in_features: int, group_size: int) -> int:
    """Inputs per unit: 128, or 64 where 128 would straddle groups or pad."""
    wide = in_features % WIDE_UNIT == 0 and group_size % (WIDE_UNIT // 2) == 0
    return WIDE_UNIT if wide else NARROW_UNIT


def prepared_w4(
    packed: torch.Tensor, group_scale: torch.Tensor, group_offset: torch.Tensor
) -> PreparedW4:
    """Weights in kernel order, from the cache if they have not changed.

    Raises:
        RuntimeError: they are not prepared yet and a CUDA graph is being captured.
    """
    parts = (packed, group_scale, group_offset)
    entry = _cache.get(packed)
    stamps = None if any(part.is_inference() for part in parts) else _stamps(parts)
    if entry is not None and entry.stamps == stamps and _same_objects(entry.parts, parts):
        return entry.prepared
    if packed.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "gemm_w4a8: weights must be prepared before a CUDA graph is captured, got a first use "
            "(or weights changed since, or made under torch.inference_mode); call the op once before"
        )
    prepared = _prepare(*parts)
    if stamps is not None:
        if packed.is_cuda:
            torch.cuda.current_stream(packed.device).synchronize()  # other streams may read it next
        _cache[packed] = _Entry(tuple(weakref.ref(part) for part in parts), stamps, prepared)
    return prepared


def _stamps(parts: tuple[torch.Tensor, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((part.data_ptr(), part._version) for part in parts)


def _same_objects(references: tuple[weakref.ref, ...], parts: tuple[torch.Tensor, ...]) -> bool:
    return all(reference() is part for reference, part in zip(references, parts, strict=True))


def _prepare(
    packed: torch.Tensor, group_scale: torch.Tensor, group_offset: torch.Tensor
) -> PreparedW4:
    in_features = 2 * packed.shape[1]
    unit = kernel_unit(in_features, in_features // group_scale.shape[1])
    words = group_scale.to(torch.int32) | ((group_offset.to(torch.int32) + 128) << 8)
    return PreparedW4(packing.split_for_kernel(packed, unit), words.t().contiguous(), unit)

"""Checks of several layers that share a launch; as in `tensors`, each raises ValueError with one sentence."""

from typing import Any

import torch

MOST = 8  # layers


def check_count(op: str, layers: int, **lists: Any) -> None:
    """Some layers, and as many of everything that is given for each."""
    if not 1 <= layers <= MOST:
        raise ValueError(
            f"{op}: weights must be those of 1 to {MOST} layers, got {layers}; call it several times"
        )
    for name, each in lists.items():
        if each is not None and len(each) != layers:
            raise ValueError(
                f"{op}: {name} must be {layers}, one for each layer, got {len(each)}; "
                "run layers without apart from those that have one"
            )


def check_alike(op: str, first: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    """Weights of one kind and group size, contiguous; parts as `gemm_fused.parts_of` gives them."""
    kinds = [_kind(parts) for parts in (first, other)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{op}: weights must be of one kind and group size, got {kinds[0]} and {kinds[1]}; run the layers apart"
        )
    codes: torch.Tensor = other[0]
    if not codes.is_contiguous():
        raise ValueError(
            f"{op}: weights must be contiguous, got strides {tuple(codes.stride())}; call .contiguous()"
        )


def _kind(parts: tuple[Any, ...]) -> str:
    codes, group_scale, group_offset = parts
    name = str(codes.dtype).removeprefix("torch.")
    if group_offset is None:
        return name
    scaled = "real" if group_scale is None else "progressive"
    return f"{name} in {group_offset.shape[1]} {scaled} groups"

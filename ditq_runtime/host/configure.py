"""Switches of a packed model at run time. They choose among implementations that exist; nothing falls back."""

from __future__ import annotations

from typing import Any

import ditq_kernels as k
from ditq_kernels.launch.backend import CHOICES, why_not
from ditq_runtime.attention.backend import choose_attention, processors_to_choose
from ditq_runtime.families.fusible import FUSION, examine, fusible_blocks
from ditq_runtime.families.fusible import why_not as why_not_fused
from ditq_runtime.layers.linear import QuantLinear


def configure(
    model: Any,
    linear: str | None = None,
    attention: str = "auto",
    fuse: bool | None = None,
    copies: bool | None = None,
) -> str:
    """Say which implementations a packed model must run, or learn that it cannot.

    Args:
        model: a packed transformer, on the device it will run on.
        linear: implementation of all ops but attention: `reference` is the exact, slow definition, on any device;
            `auto` what the device runs best: `triton` on CUDA, `cpu` on a processor with int8 dot products. To name
            either insists on it. It holds for all packed models of this process on that type of device, until the
            next call. None: as it is.
        attention: of attentions that ask diffusers' dispatcher (Flux, Qwen, Wan, ...) and that the checkpoint leaves
            float: `int8` or `bf16` probabilities and values beside int8 scores, with scales computed as they run, in
            this model only; `native` undoes it; `auto`: as it is. What the checkpoint quantized stays so.
        fuse: True: fused blocks wherever a block can run so, which is the default of every model; False: none;
            None: as it is. A block that cannot runs as ever, and `execution_report` says why.
        copies: True: weights on a CPU may be kept a second time in a form that is multiplied faster, for all packed
            models of this process: int4 as int8 on a processor with int8 dot products (three times the bytes), int8 and
            int4 in oneDNN's order with AVX2. False: never, as at first; made copies are freed. None: as it is.
            `get_memory_footprint` counts none of them, `ditq_kernels.copied_bytes()` does.

    Returns:
        The implementation of the integer linears' GEMMs: `triton`, `cpu` or `reference`.

    Raises:
        ValueError: not a packed model, an unknown switch, one that the device cannot run, or fuse=True where no block
            can. Nothing is changed then.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear) and m.format.integer_gemm]
    if not layers:
        raise ValueError(
            f"configure: {type(model).__name__} has no integer linears; load a packed transformer"
        )
    devices = {m.weight.device for m in layers}
    if linear is not None:
        _check_linear(linear, devices)
    processors = processors_to_choose(model, attention)
    if fuse is not None:
        _switch_fusion(model, fuse)
    choose_attention(processors, attention)
    if linear is not None:
        for device in devices:
            k.choose_backend(linear, device)
    if copies is not None:
        k.keep_copies(copies)
    return ", ".join(sorted({k.backend_of(m.format.ops[-1], m.weight.device) for m in layers}))


def _check_linear(linear: str, devices: set[Any]) -> None:
    if linear not in CHOICES:
        raise ValueError(f"configure: linear must be one of {', '.join(CHOICES)}, got {linear!r}")
    for device in devices:
        reason = why_not(linear, device)
        if reason:
            raise ValueError(f"configure: linear={reason}")


def _switch_fusion(model: Any, fuse: bool) -> None:
    blocks = fusible_blocks(model)
    before = {name: getattr(block, FUSION).wanted for name, block in blocks.items()}
    for block in blocks.values():
        getattr(block, FUSION).wanted = fuse
        examine(block)
    reasons = {name: why_not_fused(block) for name, block in blocks.items()}
    if fuse and all(reasons.values()):
        for name, block in blocks.items():
            getattr(block, FUSION).wanted = before[name]
        name, reason = next(iter(reasons.items()), (type(model).__name__, "it has no fused blocks"))
        raise ValueError(f"configure: fuse=True is not possible, {name}: {reason}; take fuse=None")

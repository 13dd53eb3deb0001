"""The attention rows of an execution report: what ran between the projections of every attention."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import ditq_kernels as k
from ditq_runtime.attention.install import PROCESSORS
from ditq_runtime.attention.quantized import QuantAttention
from ditq_runtime.errors import FallbackError
from ditq_runtime.format.attention import CORE, VALUES, AttentionFormat

NOT_LISTED = "float: the scheme does not list it"
NO_SCALES = nn.Module()
CHOSEN = "chosen with configure(attention=...) or set_attention_backend, not by the scheme"
FLOAT_PRODUCTS = frozenset({"bmm", "baddbmm", "mm", "addmm", "matmul", "linear", "_int_mm"})
FUSED_FLOAT = (
    "_scaled_dot_product"  # aten's name of every backend of scaled_dot_product_attention begins so
)


@dataclass(frozen=True)
class AttentionRun:
    """What one attention did between its projections.

    Attributes:
        name: module name.
        op: the operators that ran, joined by ` + `.
        scores: type of Q and K: `int8` or the float dtype.
        values: type of P and V: `int8`, `bf16` or the float dtype.
        scales: `token` or `static`; `-` for float.
        nbytes: bytes of its stored scales.
        flops: 4 * B * H * Tq * Tk * D of the observed forward, for both products.
        backend: `reference`, `triton` or `torch`.
        integer: the scores were a product of integers.
        note: why they were not, where they were not.
    """

    name: str
    op: str
    scores: str
    values: str
    scales: str
    nbytes: int
    flops: int
    backend: str
    integer: bool
    note: str = ""


@dataclass(frozen=True)
class Operation:
    """One operator that ran inside an attention, outside its linears.

    Attributes:
        name: such as `aten.bmm` or `ditq.quantize_static`.
        dtype: of its first argument.
        flops: 4 * B * H * Tq * Tk * D where it is a whole attention, else 0.
    """

    name: str
    dtype: torch.dtype
    flops: int


def operation(name: str, args: tuple[Any, ...]) -> Operation | None:
    """An operator that belongs in a row; None for any other."""
    space, _, rest = name.partition(".")
    whole = rest.startswith((FUSED_FLOAT, "attention_qk_int8"))
    if space != "ditq" and rest not in FLOAT_PRODUCTS and not whole:
        return None
    flops = 4 * args[0].numel() * args[1].shape[2] if whole else 0  # query, key: [B, H, T, D]
    return Operation(name, args[0].dtype, flops)


def check_attention_in_place(model: nn.Module, listed: Iterable[str]) -> None:
    """FallbackError if a listed attention has another processor or has lost its scales."""
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for name in listed:
        module = modules.get(name)
        processor = getattr(module, "processor", None)
        if type(processor) not in PROCESSORS:
            raise FallbackError(
                f"{name}: the scheme promises quantized attention, but its processor is a {type(processor).__name__}; "
                "load the checkpoint again and do not set another processor"
            )
        if type(getattr(module, CORE, None)) is not QuantAttention:
            raise FallbackError(f"{name}.{CORE}: is gone; load the checkpoint again")


def attention_runs(
    model: nn.Module,
    names: Iterable[str],
    listed: Mapping[str, AttentionFormat],
    ran: Mapping[str, list[Operation]],
    fused: Collection[str] = (),
) -> list[AttentionRun]:
    """One row per attention.

    Args:
        model: the packed transformer.
        names: of its attention modules.
        listed: those that the scheme promises quantized.
        ran: module name -> what ran in it outside its linears.
        fused: those in fused blocks, whose operators were held to the steps of the block: their quantizers may be
            in the GEMM before.

    Raises:
        FallbackError: a listed attention did not run, or ran something else.
    """
    rows = []
    for name in names:
        operations = ran.get(name, [])
        if name in listed:
            rows.append(
                _quantized(name, model.get_submodule(name), listed[name], operations, name in fused)
            )
        elif operations:
            rows.append(_unlisted(name, model.get_submodule(name), operations))
    return rows


def _quantized(
    name: str,
    attn: nn.Module,
    promised: AttentionFormat,
    ran: list[Operation],
    in_block: bool,
) -> AttentionRun:
    expected, names = [f"ditq.{op}" for op in promised.ops], [operation.name for operation in ran]
    if not ran or not (_whole(names, expected) or (in_block and names == expected[-1:])):
        raise FallbackError(
            f"{name}: expected {' + '.join(expected)}, but {' + '.join(names) or 'nothing'} ran"
        )
    return AttentionRun(
        name=name,
        op=" + ".join(dict.fromkeys(op.removeprefix("ditq.") for op in names)),
        scores="int8",
        values=promised.values,
        scales=promised.scales,
        nbytes=sum(
            p.numel() * p.element_size() for p in getattr(attn, CORE, NO_SCALES).parameters()
        ),
        flops=sum(operation.flops for operation in ran),
        backend=k.backend_of(promised.ops[-1], next(attn.parameters()).device),
        integer=True,
    )


def _whole(names: list[str], expected: list[str]) -> bool:
    """Whether attentions ran one after another: every operand quantized, those of two streams apart; one product."""
    runs = [(name, len(list(each))) for name, each in itertools.groupby(names)]
    one = [(name, len(list(each))) for name, each in itertools.groupby(expected)]
    in_order = [name for name, _ in runs] == [name for name, _ in one] * (len(runs) // len(one))
    quantizers = [count for name, count in runs if name == expected[0]]
    products = [count for name, count in runs if name == expected[-1]]
    return in_order and min(quantizers) >= one[0][1] and max(products) == 1


def _unlisted(name: str, attn: nn.Module, ran: list[Operation]) -> AttentionRun:
    """Of an attention that the checkpoint says nothing about."""
    for values in VALUES:
        promised = AttentionFormat(values, "token")
        if ran[-1].name == f"ditq.{promised.ops[-1]}":
            return replace(_quantized(name, attn, promised, ran, in_block=False), note=CHOSEN)
    return _float(name, ran)


def _float(name: str, ran: list[Operation]) -> AttentionRun:
    dtype = str(ran[0].dtype).removeprefix("torch.")
    return AttentionRun(
        name=name,
        op=" + ".join(dict.fromkeys(operation.name.removeprefix("aten.") for operation in ran)),
        scores=dtype,
        values=dtype,
        scales="-",
        nbytes=0,
        flops=sum(operation.flops for operation in ran),
        backend="torch",
        integer=False,
        note=NOT_LISTED,
    )

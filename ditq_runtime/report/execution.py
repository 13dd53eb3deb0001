"""execution_report: the proof that the integers ran.

One forward is observed from below: a dispatch mode sees every operator that torch executes and notes it on the linear
it ran in. A layer the scheme promises in integers that ran anything else is an error, never a row in a table.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

import ditq_kernels as k
from ditq_runtime.attention.backend import chosen_attentions, runs_flex
from ditq_runtime.errors import FallbackError
from ditq_runtime.families import Family, family_of, get_linear
from ditq_runtime.families.adaln import hoisted_modules
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.lora.branch import ADAPTER_OPS, num_running
from ditq_runtime.report.attention import (
    AttentionRun,
    attention_runs,
    check_attention_in_place,
)
from ditq_runtime.report.fused import BlockRun
from ditq_runtime.report.watch import Watch

FUSED = "fused"
UNFUSING = (
    "cross_attention_kwargs",
    "attention_mask",
    "joint_attention_kwargs",
)  # a fused block calls no attention that could take them


@dataclass(frozen=True)
class LayerRun:
    """What one linear did.

    Attributes:
        name: module name.
        op: the operators that ran, joined by ` + `.
        weights: `w8`, `w4p`, `w4g` or the float dtype.
        activations: `int8 token`, `int8 static` or the float dtype.
        nbytes: bytes of its stored tensors; those of a site that several read count with the first.
        flops: 2 * rows * K * N of the observed forward.
        backend: `reference`, `triton`, `cpu` or `torch`.
        integer: both operands of the product were integers.
        note: why it is not, where it is not; `fused` in a fused block, where one op may do the work of two layers and
            stands in the row of the second, or in that of the first of three that share an input.
    """

    name: str
    op: str
    weights: str
    activations: str
    nbytes: int
    flops: int
    backend: str
    integer: bool
    note: str = ""


@dataclass(frozen=True)
class ExecutionReport:
    """All linears of a transformer, in the order they ran, its attentions, and its blocks that have a fused forward.

    `experts` counts the parameters of its blocks that are matrices and no linear's, tensor by tensor: they stay float.
    `hoisted` counts the blocks that take the modulation of a sampling run from `ditq.prepare`; the observed forward
    belongs to no run and computes its own.
    """

    layers: list[LayerRun] = field(default_factory=list)
    attention: list[AttentionRun] = field(default_factory=list)
    blocks: list[BlockRun] = field(default_factory=list)
    hoisted: int = 0
    experts: dict[str, int] = field(default_factory=dict)

    @property
    def totals(self) -> dict[str, float]:
        """Counts, bytes, and the share of linear FLOPs that ran in integers."""
        flops = sum(layer.flops for layer in self.layers)
        integer = [layer for layer in self.layers if layer.integer]
        return {
            "linears": len(self.layers),
            "integer_linears": len(integer),
            "weight_only_linears": sum(layer.note == WEIGHT_ONLY for layer in self.layers),
            "bytes": sum(layer.nbytes for layer in self.layers)
            + sum(row.nbytes for row in self.attention),
            "integer_flops_share": sum(layer.flops for layer in integer) / max(flops, 1),
            "attentions": len(self.attention),
            "integer_attentions": sum(row.integer for row in self.attention),
            "blocks": len(self.blocks),
            "fused_blocks": sum(row.fused for row in self.blocks),
            "hoisted_blocks": self.hoisted,
            "expert_parameters": sum(self.experts.values()),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "totals": self.totals,
            "layers": [asdict(layer) for layer in self.layers],
            "attention": [asdict(row) for row in self.attention],
            "blocks": [asdict(row) for row in self.blocks],
            "experts": self.experts,
        }

    def __str__(self) -> str:
        """A table, as wide as its longest cells, with the totals as its last line."""
        table = [("layer", "op", "weights", "activations", "bytes", "backend", "note")]
        table += [
            (r.name, r.op, r.weights, r.activations, f"{r.nbytes:,}", r.backend, r.note)
            for r in self.layers
        ]
        table += [
            (r.name, r.op, "-", f"{r.scores} {r.values}", f"{r.nbytes:,}", r.backend, r.note)
            for r in self.attention
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        aligned = zip("<<<<><<", widths, strict=True)  # bytes to the right
        line = "  ".join(f"{{:{side}{width}}}" for side, width in aligned)
        rows = [line.format(*row).rstrip() for row in table]
        name = widths[0]
        rows += [f"{r.name:<{name}}  not fused: {r.note}" for r in self.blocks if not r.fused]
        rows += [
            f"{whose:<{name}}  no linear: {count} parameters stay float"
            for whose, count in self.experts.items()
        ]
        t = self.totals
        hoisted = f"modulation of {self.hoisted} hoisted, " if self.hoisted else ""
        last = (
            f"{t['integer_linears']:.0f} of {t['linears']:.0f} linears in integers, "
            f"{t['weight_only_linears']:.0f} weight-only, {100 * t['integer_flops_share']:.1f} % of linear FLOPs "
            f"in integers, {t['integer_attentions']:.0f} of {t['attentions']:.0f} attentions in integers, "
            f"{t['fused_blocks']:.0f} of {t['blocks']:.0f} blocks fused, {hoisted}"
            f"{t['bytes'] / 2**20:.2f} MiB"
        )
        return "\n".join([*rows, last])


WEIGHT_ONLY = "weight-only: integer weights, float activations"


def execution_report(model: nn.Module, inputs: dict[str, Any] | None = None) -> ExecutionReport:
    """Run one forward of a packed transformer and report, per linear and attention, what really executed.

    Args:
        model: a transformer loaded from a packed checkpoint; one that is compiled runs uncompiled here.
        inputs: keyword arguments of its forward; default: one image of the model's own size, where its family
            table has one.

    Returns:
        The report; `print` it, or take `.layers`, `.attention`, `.totals`, `.to_dict()`.

    Raises:
        ValueError: the model is not a packed transformer, needs `inputs`, or runs flex attention.
        FallbackError: a layer or attention that the scheme lists was replaced, did not run, or ran something else.
    """
    model = getattr(model, "_orig_mod", model)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    scheme = getattr(config, "scheme", None)
    if scheme is None:
        raise ValueError(
            f"execution_report: {type(model).__name__} is not a packed ditq transformer"
        )
    if runs_flex(model):
        raise ValueError(
            "execution_report: flex attention compiles itself, which cannot be observed; "
            "call set_attention_backend('native') for the report"
        )
    family = family_of(scheme.architecture)
    _check_in_place(model, scheme.layers)
    check_attention_in_place(model, scheme.attention)
    known = (*family.attention_names(model), *scheme.attention, *chosen_attentions(model))
    attentions = list(dict.fromkeys(known))
    inputs = inputs or _example_inputs(model, family)
    given = next((n for n in UNFUSING if inputs.get(n) is not None and inputs[n] != {}), None)
    watch = Watch(model, attentions, "" if given is None else f"{given} given to the model")
    with _uncompiled(model), watch, torch.no_grad():
        model(**inputs)
    watch.finish()
    layers = []
    for name in watch.order:
        layer = watch.linear(name) or get_linear(model, name)
        if isinstance(layer, QuantLinear):
            layers.append(_packed_run(name, layer, watch))
        else:
            layers.append(_float_run(name, layer, watch, family.why_kept(name)))
    idle = sorted(set(scheme.layers) - set(watch.order))
    if idle:
        raise FallbackError(
            f"{idle[0]}: listed in the scheme, but no operator ran in it during a forward"
        )
    runs = attention_runs(
        model, attentions, scheme.attention, watch.products, watch.fused_attentions
    )
    blocks = {model.get_submodule(name): name for name in family.block_names(model)}
    holders = hoisted_modules(model)
    hoisted = sum(any(module in holders for module in block.modules()) for block in blocks)
    experts = {k: n for block, name in blocks.items() for k, n in _experts(block, name).items()}
    return ExecutionReport(layers, runs, watch.blocks, hoisted, experts)


def _experts(block: nn.Module, name: str) -> dict[str, int]:
    """Parameters [E, in, out] of a block, which no linear holds: full name -> how many numbers."""
    return {
        f"{name}.{inner}.{own}".replace("..", "."): parameter.numel()
        for inner, module in block.named_modules()
        if not isinstance(module, QuantLinear | nn.Conv1d | nn.ConvTranspose1d)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    }


def _uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Run what is compiled as it is written: operators can be seen there alone."""
    if any(m._compiled_call_impl is not None for m in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _example_inputs(model: nn.Module, family: Family) -> dict[str, Any]:
    if family.example_inputs is None:
        raise ValueError(
            f"execution_report: ditq does not know what a forward of {family.architecture} takes; "
            "pass its keyword arguments as inputs"
        )
    return family.example_inputs(model)


def _check_in_place(model: nn.Module, listed: dict[str, str]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in listed:
        module = modules.get(name)
        if type(getattr(module, "base_layer", module)) is not QuantLinear:  # PEFT adds beside it
            raise FallbackError(
                f"{name}: the scheme promises a packed layer, but the model has a {type(module).__name__} there; "
                "load the checkpoint again and do not replace or wrap its linears"
            )


def _packed_run(name: str, layer: QuantLinear, watch: Watch) -> LayerRun:
    if layer.format.weights == "fp32":
        return _float_run(name, layer, watch, "folded but kept float by --keep")
    if name not in watch.fused_ops:
        _check_ops(name, layer, watch.ran[name])
    ops = watch.fused_ops.get(name, layer.format.ops)
    activations = f"int8 {layer.format.activations}" if layer.format.integer_gemm else "fp32"
    note = FUSED if name in watch.fused_ops else ""
    return LayerRun(
        name=name,
        op=" + ".join(ops),
        weights=layer.format.weights,
        activations=activations,
        nbytes=_nbytes(layer) + _site_bytes(name, layer),
        flops=2 * watch.rows[name] * layer.in_features * layer.out_features,
        backend=k.backend_of(ops[-1], layer.weight.device),
        integer=layer.format.integer_gemm,
        note=note if layer.format.integer_gemm else WEIGHT_ONLY,
    )


def _check_ops(name: str, layer: QuantLinear, ran: list[str]) -> None:
    """FallbackError unless a layer that is no part of a fused block ran what its format promises."""
    expected = [f"ditq.{op}" for op in layer.format.ops]
    expected += ADAPTER_OPS * num_running(layer)
    if not ran or ran != expected * (len(ran) // len(expected)):
        raise FallbackError(
            f"{name}: expected {' + '.join(expected)}, but {' + '.join(ran) or 'nothing'} ran"
        )


def _float_run(name: str, layer: nn.Linear, watch: Watch, reason: str) -> LayerRun:
    dtype = str(layer.weight.dtype).removeprefix("torch.")
    return LayerRun(
        name=name,
        op=" + ".join(op.removeprefix("aten.") for op in dict.fromkeys(watch.ran[name])),
        weights=dtype,
        activations=dtype,
        nbytes=_nbytes(layer),
        flops=2 * watch.rows[name] * layer.in_features * layer.out_features,
        backend="torch",
        integer=False,
        note=reason,
    )


def _site_bytes(name: str, layer: QuantLinear) -> int:
    if layer.site is None or layer.site.format.readers[0] != name:
        return 0
    return _nbytes(layer.site)


def _nbytes(layer: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in layer.parameters(recurse=False))

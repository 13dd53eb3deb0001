"""Which parameters of the blocks became integers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ditq_converters.sites.reasons import EMBEDDER
from ditq_runtime import QuantLinear
from ditq_runtime.families import Family


def shares(model: nn.Module, packed: nn.Module, family: Family) -> tuple[float, float]:
    """Of the parameters of linears and experts in the blocks: how many are integers, and how many have four bits.

    Embedders that stand in every block (DiT) see one row per sample and do not count.
    """
    total, integer, four = 0, 0, 0
    packed_layers = dict(packed.named_modules())
    for name, parameters in block_parameters(model, family):
        layer = packed_layers.get(name)
        total += parameters
        if isinstance(layer, QuantLinear) and layer.format.weights != "fp32":
            integer += parameters
            four += parameters * layer.format.weights.startswith("w4")
    return integer / total, four / total


def block_parameters(model: nn.Module, family: Family) -> Iterator[tuple[str, int]]:
    """(name, parameters) of every linear and every experts' tensor in the blocks, embedders left out."""
    inside = tuple(f"{block}." for block in family.block_tables(model))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        if name.startswith(inside) and family.kept.get(name) != EMBEDDER:
            yield name, sum(p.numel() for p in linear.parameters())
    for name in family.kept:
        if name not in linears and name.startswith(inside):
            yield name, model.get_parameter(name).numel()

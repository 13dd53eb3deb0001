"""Why linears and other weights stay float, in words."""

from __future__ import annotations

from torch import nn

from ditq_converters.sites.experts import EXPERTS, expert_parameters, gates, routes
from ditq_converters.sites.usage import Usage

EMBEDDER = "embedder: one row per sample, kept float"
OUTSIDE = "outside the repeated blocks: embedder or final layer, kept float"
ROUTER = "router of a mixture of experts: its choices are not to be disturbed, kept float"
GATE = "gate: a few numbers per token, kept float"
UNREAD = "not read by the traced forward, kept float"
UNCALLED = "its weight is read without a call of its module, kept float"
SUBCLASS = "a subclass of nn.Linear, kept float"


def why_float(usage: Usage, name: str, module: nn.Linear) -> str | None:
    """Why a linear of the repeated blocks stays float; None if it becomes integers."""
    if type(module) is not nn.Linear:
        return SUBCLASS
    if name not in usage.graph.calls:
        return UNREAD
    if name not in usage.graph.called:
        return UNCALLED
    if usage.per_sample(name):
        return EMBEDDER if usage.embeds(name) else None
    if routes(usage, name):
        return ROUTER
    return GATE if gates(usage, name) else None


def kept(usage: Usage, model: nn.Module, twins: dict[str, str]) -> dict[str, str]:
    """Full name of every linear of a model that stays float, and of its experts' weights -> why.

    Args:
        usage: of its twin.
        model: the model.
        twins: block -> the twin's block that stands for it.
    """
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        block = next((b for b in twins if name.startswith(f"{b}.")), None)
        if block is None:
            found[name] = _why_outside(usage, name, module)
            continue
        why = why_float(usage, twins[block] + name.removeprefix(block), module)
        if why is not None:
            found[name] = why
    for parameter in expert_parameters(usage):
        for block, of_twin in twins.items():
            if parameter.startswith(f"{of_twin}."):
                found[block + parameter.removeprefix(of_twin)] = EXPERTS
    return found


def _why_outside(usage: Usage, name: str, module: nn.Linear) -> str:
    """Why a linear outside of the repeated blocks stays float."""
    if name in usage.graph.calls and usage.per_sample(name):
        return EMBEDDER
    return OUTSIDE if name not in usage.graph.calls else why_float(usage, name, module) or OUTSIDE

"""Error of every linear of a packed model, on the inputs its quantized predecessors give it (cascade, METHODS 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ditq_converters.trajectory import Call, SamplingPlan, predict
from ditq_runtime.families import ValueRows, family_of


def comparable_layers(model: nn.Module) -> list[str]:
    """Linears whose output a fold leaves as it was: not the modulations, not V (scaled rows)."""
    family = family_of(type(model).__name__)
    scaled = {site.producer.value for site in family.sites if isinstance(site.producer, ValueRows)}
    inside = [name for site in family.sites for name in site.consumers if name not in scaled]
    return [f"{block}.{name}" for block in family.block_names(model) for name in inside]


@torch.no_grad()
def layer_errors(
    model: nn.Module,
    quantized: nn.Module,
    calls: list[Call],
    plan: SamplingPlan,
    after_call: Callable[[], None] | None = None,
) -> tuple[list[str], torch.Tensor]:
    """Relative Frobenius error |Yq - Y| / |Y| per layer and call; both models get the float model's latents.

    Args:
        model: float transformer.
        quantized: packed transformer.
        calls: of a float run.
        plan: the plan of that run.
        after_call: told when a call is done.

    Returns:
        Layer names, and errors fp64 [layers, calls].
    """
    names = comparable_layers(model)
    errors = torch.zeros(len(names), len(calls), dtype=torch.float64)
    for column, call in enumerate(calls):
        reference = _outputs(model, names, call, plan)
        outputs = _outputs(quantized, names, call, plan)
        for row, name in enumerate(names):
            truth = reference[name].double()
            errors[row, column] = (outputs[name].double() - truth).norm() / truth.norm()
        if after_call is not None:
            after_call()
    return names, errors


def _outputs(
    model: nn.Module, names: list[str], call: Call, plan: SamplingPlan
) -> dict[str, torch.Tensor]:
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        return lambda module, args, output: seen[name].append(output.detach().float().cpu())

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        predict(model, call.latents, torch.tensor(call.timestep), plan)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}

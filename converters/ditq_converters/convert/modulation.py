"""What modulation linears read. It depends on timestep and class or prompt alone, so it is exact: nothing is quantized.

Calibration records it. Where a block embeds timestep and class itself, as DiT's do, it is made here as well, for
classes and timesteps that no calibration met, and without any.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from torch import nn

from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.bias_correction import SampledRows
from ditq_converters.convert.classes import different_classes
from ditq_converters.convert.gptq import error_feedback
from ditq_converters.convert.observed import Observed
from ditq_converters.plan.entries import LinearPlan

TIMESTEPS, LAST = 50, 999.0  # made, evenly from 0 to the last
LABELS = 10  # classes per timestep, in turn; and as often none, as guidance has it


def observe_modulation(
    model: nn.Module,
    entry: LinearPlan,
    stats: CalibrationStats | None,
    groups: Sequence[int],
) -> Observed:
    """What is known about the input of a modulation linear.

    Args:
        model: with the weights of its block.
        entry: of the plan.
        stats: of the model, if there are any.
        groups: [T] timestep group of every call; empty without groups.

    Raises:
        StatisticsError: the statistics kept no such inputs.
    """
    if not entry.needs_rows:
        return Observed()
    parts: list[SampledRows] = []
    if stats is not None:
        x, calls = stats.modulation(entry.name)
        group = [groups[call] if groups else 0 for call in calls]
        parts.append(SampledRows(x.double(), torch.tensor(group)))
    made = made_inputs(model, entry.name)
    if made is not None:
        x, timesteps = made
        parts.append(SampledRows(x.double(), _groups(timesteps, stats, groups)))
    if not parts:
        return Observed()
    rows = SampledRows(torch.cat([p.x for p in parts]), torch.cat([p.group for p in parts]))
    corrects = entry.bias_correction
    feedback = None if entry.rounding == "nearest" else error_feedback(rows.x, centred=corrects)
    static = entry.activations == "static"
    limits = (rows.x.min().float(), rows.x.max().float()) if static else None
    return Observed(limits, feedback, (lambda: rows) if corrects else None)


@torch.no_grad()
def made_inputs(model: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """SiLU(emb(timestep, class)) of a block that embeds both itself, for all kinds of both.

    Args:
        model: with the weights of the block.
        name: of the modulation linear.

    Returns:
        [R, K] inputs, and their timesteps [R]; None where the block is told its embedding, or its weights are absent.
    """
    norm = model.get_submodule(name.rpartition(".")[0])
    embedder = getattr(norm, "emb", None)
    if not isinstance(embedder, CombinedTimestepLabelEmbeddings):
        return None
    table = embedder.class_embedder.embedding_table.weight
    if table.is_meta:
        return None
    labels = different_classes(table)
    turns = torch.arange(TIMESTEPS * LABELS).reshape(TIMESTEPS, LABELS) % len(labels)
    none = torch.full((TIMESTEPS, LABELS), len(table) - 1)
    asked = torch.cat([labels[turns], none], dim=1).flatten().to(table.device)
    timesteps = torch.linspace(LAST, 0, TIMESTEPS).repeat_interleave(2 * LABELS)
    emb = embedder(timesteps.to(table.device), asked, hidden_dtype=table.dtype)
    rows: torch.Tensor = norm.get_submodule("silu")(emb)
    return rows.float().cpu(), timesteps


def _groups(
    timesteps: torch.Tensor, stats: CalibrationStats | None, groups: Sequence[int]
) -> torch.Tensor:
    """[R] the timestep group of the call that is nearest to each timestep."""
    if stats is None or not groups:
        return torch.zeros(len(timesteps), dtype=torch.int64)
    calls = (timesteps[:, None] - torch.tensor(stats.timesteps)).abs().argmin(dim=1)
    return torch.tensor(groups)[calls]

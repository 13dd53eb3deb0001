"""The classes of a model that embeds them itself, as DiT does: all are known without data.

Calibration draws a few. What a block makes of the others can be computed all the same: at the latents that calibration
kept, the float model can be asked about any class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from torch import nn

from ditq_converters.calibrate.transformer_calls import TransformerCall
from ditq_converters.streaming.model import tensors_of

ARGUMENT = "class_labels"
# its multiples, taken modulo 1, fill [0, 1) evenly however many are taken
GOLDEN = (5**0.5 - 1) / 2
TABLE = "class_embedder.embedding_table"


def different_classes(table: torch.Tensor) -> torch.Tensor:
    """[L] classes that are embedded differently, each once, rising; `table` is [C, D]. Untrained classes are alike."""
    _, kind = torch.unique(table, dim=0, return_inverse=True)
    first = torch.full((int(kind.max()) + 1,), len(table)).scatter_reduce(
        0, kind.cpu(), torch.arange(len(table)), "amin"
    )
    return first.sort().values


def ask_all_classes(model: nn.Module, calls: Sequence[TransformerCall]) -> list[TransformerCall]:
    """The calls with all classes of the model, in turn, in place of those that were drawn; latents and timesteps stay.

    Samples without a class stay without one, as guidance has it.

    Args:
        model: in memory or on disk.
        calls: of it.

    Returns:
        As many calls of the same sizes; the very calls where the model is told its embedding, or they name no classes.
    """
    found = class_table(model)
    if found is None:
        return list(calls)
    table, none = found
    classes = different_classes(table[:none])
    if none < len(table):  # an untrained class is like none
        classes = classes[(table[classes] != table[none]).any(1)]
    if not len(classes):
        return list(calls)
    asked, count = [], 0
    for call in calls:
        labels = call.kwargs.get(ARGUMENT)
        if not isinstance(labels, torch.Tensor):
            asked.append(call)
            continue
        labels = labels.clone()
        drawn = labels < none
        turns = torch.arange(count + 1, count + 1 + int(drawn.sum())).double() * GOLDEN % 1
        labels[drawn] = classes[(turns * len(classes)).long()].to(labels)
        count += len(turns)
        asked.append(replace(call, kwargs={**call.kwargs, ARGUMENT: labels}))
    return asked


def class_table(model: nn.Module) -> tuple[torch.Tensor, int] | None:
    """The embeddings of classes [C, D], and how many classes there are: the row behind them stands for none."""
    for name, module in model.named_modules():
        if isinstance(module, CombinedTimestepLabelEmbeddings):
            tensors = dict(tensors_of(model, f"{name}.{TABLE}"))
            embedder = module.class_embedder
            return tensors[f"{name}.{TABLE}.weight"], int(embedder.num_classes)
    return None

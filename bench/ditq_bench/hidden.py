"""Classes that a conversion cannot know: their embeddings are taken out of the model before, and put back after it.

A DiT's class embeddings are among its weights, so rounding may use all of them without data (`convert.classes`). Where
the judged classes are hidden, neither calibration nor rounding has ever seen them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

HIDDEN = "hidden "  # before the name of a case whose judged classes are hidden


@torch.no_grad()
def hide(model: nn.Module, classes: Sequence[int], behind: int) -> torch.Tensor:
    """Give classes the embedding of another one, in place.

    Args:
        model: embeds them, in every block alike.
        classes: to hide.
        behind: the class that they look like then.

    Returns:
        [len(classes), D] what they were.
    """
    first = next(_tables(model))
    were = first[list(classes)].clone()
    for table in _tables(model):
        table[list(classes)] = table[behind].clone()
    return were


@torch.no_grad()
def reveal(model: nn.Module, classes: Sequence[int], were: torch.Tensor) -> None:
    """Put what `hide` took into a packed model, as bf16 holds it."""
    for table in _tables(model):
        table[list(classes)] = were.bfloat16().to(table)


def _tables(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            yield module.embedding_table.weight.data

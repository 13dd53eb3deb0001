"""Fold a site's transform into what discovery found: the weights of a norm, the linear factor of a gated MLP.

Exact. A site's input X becomes (X - z) u with u = 1 / s:

* norm: weight <- u weight, bias <- u (bias - z), for X = norm(h) * weight + bias;
* product: rows (W, b) <- u (W, b), for X = linear(h) * g(h); a shift would be multiplied by g, so there is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ditq_converters.methods import Transform
from ditq_runtime.families import AdaLN, NormWeights, OnTheFly, Producer, ProductRows, ValueRows

if TYPE_CHECKING:
    from ditq_converters.convert.fold import LinearTensors


def absorbs(producer: Producer, transform: Transform) -> bool:
    """Whether a producer takes all of a transform; otherwise the quantizer applies all of it.

    Shifts per timestep group go into AdaLN alone: nothing else in a block knows the timestep.
    """
    match producer:
        case AdaLN():
            return True
        case OnTheFly():
            return False
        case ProductRows():
            return transform.shift is None
        case NormWeights() | ValueRows():
            return transform.shift is None or (producer.takes_shift and len(transform.shift) == 1)


def fold_norm(norm: LinearTensors, transform: Transform) -> None:
    """Fold into a norm in place: its weight [K, 1] and its bias [1, K] or None.

    Raises:
        ValueError: a shift, and no bias to take it.
    """
    if transform.shift is not None:
        if norm.bias is None or len(transform.shift) > 1:
            raise ValueError(
                "fold: a norm takes one shift if it has a bias, and none otherwise; leave it to the quantizer"
            )
        norm.add_to_bias(-transform.shift)
    if transform.smooth is not None:
        norm.scale_rows(slice(None), 1 / transform.smooth)


def fold_product(linear: LinearTensors, producer: ProductRows, transform: Transform) -> None:
    """Fold a factor into some rows of a linear in place.

    Raises:
        ValueError: a shift.
    """
    if transform.shift is not None:
        raise ValueError(
            "fold: a product takes no shift, its other factor would multiply it; leave it to the quantizer"
        )
    if transform.smooth is not None:
        linear.scale_rows(slice(producer.start, producer.stop), 1 / transform.smooth)


def norm_tensors(norm: LinearTensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the checkpoint stores of a folded norm: `weight` [K] and, where it has one, `bias` [K]."""
    stored = {"weight": norm.weight[:, 0].to(dtype)}
    if norm.bias is not None:
        stored["bias"] = norm.bias[0].to(dtype)
    return {name: tensor.contiguous() for name, tensor in stored.items()}

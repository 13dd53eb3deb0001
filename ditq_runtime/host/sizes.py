"""How many bytes of what a packed folder holds."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from ditq_runtime.families import Family, family_of
from ditq_runtime.format.attention import CORE
from ditq_runtime.format.folder import TransformerFolder
from ditq_runtime.format.layer import GROUPED
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.format.site import SITES

SCALES = "channel and activation scales"
CATEGORY_OF_FIELD = {
    "weight": "block weights",
    "group_scale": "group scales and offsets",
    "group_offset": "group scales and offsets",
    "weight_zero": "group scales and offsets",
    "bias": "biases",
    "weight_scale": SCALES,
    "weight_sum": SCALES,
    "act_scale": SCALES,  # of a linear in version 1, as the next two
    "act_zero": SCALES,
    "smooth_inv": SCALES,
    "q_scale": SCALES,
    "k_scale": SCALES,
    "v_scale": SCALES,
    "lora_down": "low-rank branches",
    "lora_up": "low-rank branches",
}
CATEGORY_OF_SITE = {
    "scale": "folds",
    "fold_shift": "folds",
}  # the others scale channels and activations
CATEGORIES = (
    "block weights",
    "modulation weights",
    "group scales and offsets",
    SCALES,
    "biases",
    "low-rank branches",
    "folds",
    "timestep and label embedder",
    "other float",
    "file headers",
)


def add_up(sizes: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sum of several folders' sizes."""
    total = dict.fromkeys(CATEGORIES, 0)
    for one in sizes:
        for name, size in one.items():
            total[name] += size
    return total


def size_by_category(folder: TransformerFolder, like: Scheme | None = None) -> dict[str, int]:
    """Bytes on disk by CATEGORIES; they add up to `folder.nbytes`. Layers that `--keep` left float are other float.

    Args:
        folder: packed, or float.
        like: of a float folder, the scheme of its packed twin: the layers that it packed stand under its categories.
    """
    family = family_of(str(folder.config.get("_class_name")))
    tensors = ((name, len(x.shape), x.nbytes) for name, x in folder.headers.items())
    sizes = _sorted(tensors, family, folder.scheme or like)
    sizes["file headers"] = folder.nbytes - sum(sizes.values())
    return sizes


def size_in_memory(model: nn.Module, like: Scheme | None) -> dict[str, int]:
    """Bytes of a float model's parameters by CATEGORIES, as its packed twin's scheme sorts them."""
    tensors = (
        (name, p.dim(), p.numel() * p.element_size()) for name, p in model.named_parameters()
    )
    return _sorted(tensors, family_of(type(model).__name__), like)


def _sorted(
    tensors: Iterable[tuple[str, int, int]], family: Family, scheme: Scheme | None
) -> dict[str, int]:
    """Bytes by category of tensors, given as name, number of dimensions, bytes."""
    sizes = dict.fromkeys(CATEGORIES, 0)
    for name, dimensions, nbytes in tensors:
        layer, _, field = name.rpartition(".")
        if family.shared_embedder and f".{family.shared_embedder}." in name:
            category = "timestep and label embedder"
        elif f".{SITES}." in name:
            category = CATEGORY_OF_SITE.get(field, SCALES)
        elif ".folds." in name:  # version 1
            category = "folds"
        elif scheme is None:
            category = "other float"
        else:
            category = _of_layer(scheme, layer, field, dimensions)
        sizes[category] += nbytes
    return sizes


def _of_layer(scheme: Scheme, layer: str, field: str, dimensions: int) -> str:
    """The category of one tensor of a layer."""
    if layer.removesuffix(f".{CORE}") in scheme.attention:
        return CATEGORY_OF_FIELD.get(field, "other float")
    if layer not in scheme.layers or scheme.format_of(layer).weights == "fp32":
        return "other float"
    if field == "weight" and not scheme.format_of(layer).integer_gemm:
        return "modulation weights"
    if field in ("weight_scale", "weight_sum") and dimensions == 2:  # one a group
        return "group scales and offsets"
    return CATEGORY_OF_FIELD.get(field, "other float")


def float_weights(folder: TransformerFolder) -> tuple[float, list[str]]:
    """The share of the weights of a packed folder that is stored in floats, and their names, the largest first.

    Weights are what multiplies: tensors of two dimensions or more; scales, shifts and tables of timesteps are none.
    """
    scheme = folder.scheme
    assert scheme is not None
    counts: dict[str, int] = {}
    integers = 0
    for name, info in folder.headers.items():
        layer, _, field = name.rpartition(".")
        form = scheme.format_of(layer) if layer in scheme.layers else None
        count = math.prod(info.shape)
        if form is not None and field != "weight":
            continue
        if form is not None and form.weights != "fp32":
            integers += count * (2 if form.weights in GROUPED else 1)
        elif len(info.shape) > 1 and info.dtype.is_floating_point and f".{SITES}." not in name:
            counts[layer if field == "weight" else name] = count
    names = sorted(counts, key=lambda name: (-counts[name], name))
    floats = sum(counts.values())
    return floats / max(floats + integers, 1), names

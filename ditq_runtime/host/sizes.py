"""How many bytes of what a packed folder holds."""

from __future__ import annotations

from collections.abc import Iterable

from ditq_runtime.families import family_of
from ditq_runtime.format.attention import CORE
from ditq_runtime.format.folder import TransformerFolder
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


def size_by_category(folder: TransformerFolder) -> dict[str, int]:
    """Bytes on disk by CATEGORIES; they add up to `folder.nbytes`. Layers that `--keep` left float are other float."""
    family, scheme = family_of(str(folder.config.get("_class_name"))), folder.scheme
    sizes = dict.fromkeys(CATEGORIES, 0)
    for name, info in folder.headers.items():
        layer, _, field = name.rpartition(".")
        layer_format = scheme.format_of(layer) if scheme and layer in scheme.layers else None
        if family.shared_embedder and f".{family.shared_embedder}." in name:
            category = "timestep and label embedder"
        elif f".{SITES}." in name:
            category = CATEGORY_OF_SITE.get(field, SCALES)
        elif ".folds." in name:  # version 1
            category = "folds"
        elif scheme and layer.removesuffix(f".{CORE}") in scheme.attention:
            category = CATEGORY_OF_FIELD.get(field, "other float")
        elif layer_format is None or layer_format.weights == "fp32":
            category = "other float"
        elif field == "weight" and not layer_format.integer_gemm:
            category = "modulation weights"
        elif field in ("weight_scale", "weight_sum") and len(info.shape) == 2:  # one a group
            category = "group scales and offsets"
        else:
            category = CATEGORY_OF_FIELD.get(field, "other float")
        sizes[category] += info.nbytes
    sizes["file headers"] = folder.nbytes - sum(sizes.values())
    return sizes

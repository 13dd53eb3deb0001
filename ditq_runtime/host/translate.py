"""A checkpoint of format version 1 becomes one of this version: its scheme gets the sites of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ditq_runtime.families import family_of
from ditq_runtime.families.placing import homes_of, placed_sites
from ditq_runtime.format.safetensors_header import TensorInfo
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.format.version1 import Renaming, Version1


def translate(
    model: nn.Module, old: Version1, headers: Mapping[str, TensorInfo]
) -> tuple[Scheme, dict[str, TensorInfo], Renaming]:
    """The scheme and the headers of this version, and what renames tensors.

    Args:
        model: a float transformer of the scheme's architecture, on meta is enough.
        old: its scheme.
        headers: of its files.

    Raises:
        CheckpointError: the scheme, the headers and the model contradict each other.
    """
    family = family_of(old.scheme.architecture)
    renaming = Renaming(homes_of(model, family))
    formats = {name: old.scheme.format_of(name) for name in old.scheme.layers}
    shapes = old.site_shapes(renaming.homes)
    scheme = replace(old.scheme, sites=placed_sites(model, family, formats, shapes))
    scheme.check_sites()
    return scheme, renaming.headers(headers, old.expected()), renaming

"""Methods: from statistics and weights to smoothing factors and shifts. Tensors in, tensors out.

base.py says what a method is given and gives, registry.py which methods there are; the others are one method each, or
what several share.
"""

from ditq_converters.methods.base import (
    BlockTransform,
    Method,
    NoOptions,
    Quantizers,
    SiteData,
    Transform,
)
from ditq_converters.methods.registry import Registry

METHODS = Registry()

__all__ = [
    "METHODS",
    "BlockTransform",
    "Method",
    "NoOptions",
    "Quantizers",
    "SiteData",
    "Transform",
]

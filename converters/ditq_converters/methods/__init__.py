"""Methods: from statistics and weights to smoothing factors and shifts. Tensors in, tensors out."""

from ditq_converters.methods.base import BlockTransform, Method, Options, SiteData, Transform
from ditq_converters.methods.ditas import DITAS
from ditq_converters.methods.htg import HTG
from ditq_converters.methods.linear import LINEAR
from ditq_converters.methods.meta import META
from ditq_converters.methods.ptq4dit import PTQ4DIT
from ditq_converters.methods.smoothquant import SMOOTHQUANT

METHODS: dict[str, Method] = {
    method.name: method for method in (LINEAR, SMOOTHQUANT, META, DITAS, PTQ4DIT, HTG)
}

__all__ = ["METHODS", "BlockTransform", "Method", "Options", "SiteData", "Transform"]

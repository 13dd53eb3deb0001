"""Methods: from statistics and weights to smoothing factors. Tensors in, tensors out; no modules, no files."""

from ditq_converters.methods.base import Method, SiteData
from ditq_converters.methods.linear import LINEAR
from ditq_converters.methods.smoothquant import SMOOTHQUANT

METHODS: dict[str, Method] = {method.name: method for method in (LINEAR, SMOOTHQUANT)}

__all__ = ["METHODS", "Method", "SiteData"]

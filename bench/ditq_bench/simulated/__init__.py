"""Simulations of published quantizers in float, to compare with published figures. None of them runs in integers.

What `ditq convert` writes never passes through here: these quantizers have no integer form (a scale per input channel
inside the sum of a product) or cannot serve (a range over the whole batch makes an image depend on its batch mates).
"""

from ditq_bench.simulated.simulate import simulate

__all__ = ["simulate"]

"""One-step calibration (Yang et al., An Analysis on Quantizing Diffusion Transformers, section 3.3.1).

No transform: static activations take the range of the noisiest call alone. The paper's calibration is one forward at
the largest timestep, so the first call must be there; its weight groups (Alg. 1) are 128 inputs wide, `w4g` with zero
points left out (`w4p` is the form with integer scales).
"""

from ditq_converters.methods.base import Method

META = Method(
    name="meta",
    source="Yang et al., An Analysis on Quantizing Diffusion Transformers, section 3.3.1",
    needs_statistics=True,
    transform=None,
    static_call=0,
    group_size=128,
    symmetric=True,
)

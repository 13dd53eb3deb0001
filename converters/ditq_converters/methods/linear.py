"""LinearQuant: no transform; the baseline every paper compares with."""

from ditq_converters.methods.base import Method

LINEAR = Method(
    name="linear",
    source="round-to-nearest, no transform",
    needs_statistics=False,
    transform=None,
)

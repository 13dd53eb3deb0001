"""Named GEMM shapes of real transformers: tokens M, inputs K, outputs N."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GemmShape:
    """One linear of a model at one batch: [tokens, inputs] x [outputs, inputs]^T."""

    name: str
    tokens: int
    inputs: int
    outputs: int

    @property
    def operations(self) -> int:
        """Multiplications and additions of one call."""
        return 2 * self.tokens * self.inputs * self.outputs


def _block(model: str, tokens: int, width: int) -> tuple[GemmShape, ...]:
    return (
        GemmShape(f"{model} qkv", tokens, width, 3 * width),
        GemmShape(f"{model} o_proj", tokens, width, width),
        GemmShape(f"{model} fc1", tokens, width, 4 * width),
        GemmShape(f"{model} fc2", tokens, 4 * width, width),
    )


# Tokens: 16 images of the demo model, one image of the others, each with its null half.
SHAPES: dict[str, tuple[GemmShape, ...]] = {
    "digits": _block("digits", 512, 128),
    "dit-xl-256": _block("dit-xl-256", 512, 1152),
    "dit-xl-512": _block("dit-xl-512", 2048, 1152),
    "pixart-1024": _block("pixart-1024", 8192, 1152),
}

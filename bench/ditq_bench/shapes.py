"""Named shapes of real transformers: GEMMs (tokens M, inputs K, outputs N) and self-attention."""

from __future__ import annotations

from dataclasses import dataclass, replace


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

    def batched(self, images: int) -> GemmShape:
        """The same linear for so many times the images."""
        if images == 1:
            return self
        return replace(self, name=f"{self.name} x{images}", tokens=images * self.tokens)


@dataclass(frozen=True)
class AttentionShape:
    """Self-attention of one block: sequences (images, and their null halves), heads, tokens, head dimension."""

    name: str
    sequences: int
    heads: int
    tokens: int
    head_dim: int

    @property
    def operations(self) -> int:
        """Multiplications and additions of both products."""
        return 4 * self.sequences * self.heads * self.tokens**2 * self.head_dim

    def batched(self, images: int) -> AttentionShape:
        """The same attention for so many times the images."""
        if images == 1:
            return self
        return replace(self, name=f"{self.name} x{images}", sequences=images * self.sequences)


def _block(model: str, tokens: int, width: int) -> tuple[GemmShape, ...]:
    return (
        GemmShape(f"{model} qkv", tokens, width, 3 * width),
        GemmShape(f"{model} o_proj", tokens, width, width),
        GemmShape(f"{model} fc1", tokens, width, 4 * width),
        GemmShape(f"{model} fc2", tokens, 4 * width, width),
    )


# Tokens: 16 images of the demo model, one image of the others, each with its null half; Flux has none.
# SD3 (3.5 large) has 333 text tokens beside 4096 of the image, Flux 512; both join them in attention.
SHAPES: dict[str, tuple[GemmShape, ...]] = {
    "digits": _block("digits", 512, 128),
    "dit-xl-256": _block("dit-xl-256", 512, 1152),
    "dit-xl-512": _block("dit-xl-512", 2048, 1152),
    "pixart-1024": _block("pixart-1024", 8192, 1152),
    "sd3-1024": _block("sd3-1024", 8858, 2432),
    "flux-1024": (
        *_block("flux-1024", 4608, 3072),
        GemmShape("flux-1024 qkv+fc1", 4608, 3072, 21504),
        GemmShape("flux-1024 o_proj+fc2", 4608, 15360, 3072),
    ),
}
ATTENTION_SHAPES: dict[str, tuple[AttentionShape, ...]] = {
    "digits": (AttentionShape("digits attention", 32, 4, 16, 32),),
    "dit-xl-256": (AttentionShape("dit-xl-256 attention", 2, 16, 256, 72),),
    "dit-xl-512": (AttentionShape("dit-xl-512 attention", 2, 16, 1024, 72),),
    "pixart-1024": (AttentionShape("pixart-1024 attention", 2, 16, 4096, 72),),
    "sd3-1024": (AttentionShape("sd3-1024 attention", 2, 38, 4429, 64),),
    "flux-1024": (AttentionShape("flux-1024 attention", 1, 24, 4608, 128),),
}

"""Where channels can be scaled and shifted without changing a model's function: DiT's and Flux's sites.

A site is an activation with the linears that read it. Its channels can be edited through parameters
of what makes it, and the readers' columns and biases take that back. All products are taken in fp64
and rounded once to the parameters' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Modulated:
    """`norm(x) * (1 + adaln_scale) + adaln_shift`, and its readers.

    Attributes:
        modulation: makes the shift and, in the chunk after it, the scale.
        chunk: index of the shift's chunk among the modulation's outputs.
        readers: linears whose first columns read the activation.
    """

    modulation: nn.Linear
    chunk: int
    readers: tuple[nn.Linear, ...]

    def multiply(self, factors: torch.Tensor) -> None:
        """Multiply the channels by `factors` [K] fp64, in place.

        f * (1 + scale) = 1 + (f * scale + f - 1), so the scale's bias b becomes f * b + f - 1.
        """
        shift, scale = self._rows(self.chunk, factors), self._rows(self.chunk + 1, factors)
        bias = self.modulation.bias[scale].double() * factors + factors - 1
        _multiply_rows(self.modulation, shift, factors)
        _multiply_rows(self.modulation, scale, factors)
        self.modulation.bias[scale] = bias.to(self.modulation.bias.dtype)
        _divide_columns(self.readers, factors)

    def add(self, offsets: torch.Tensor) -> None:
        """Add `offsets` [K] fp64 to the channels, in place: through the shift's bias."""
        rows, bias = self._rows(self.chunk, offsets), self.modulation.bias
        bias[rows] = (bias[rows].double() + offsets).to(bias.dtype)
        _compensate(self.readers, offsets)

    def _rows(self, chunk: int, values: torch.Tensor) -> slice:
        return slice(chunk * len(values), (chunk + 1) * len(values))


@dataclass(frozen=True)
class Values:
    """An attention's output, edited through its values: averaging over tokens keeps channels apart.

    Attributes:
        makers: linears that make the values; several where streams attend together.
        readers: linears whose first columns read the output.
    """

    makers: tuple[nn.Linear, ...]
    readers: tuple[nn.Linear, ...]

    def multiply(self, factors: torch.Tensor) -> None:
        """Multiply the channels by `factors` [K] fp64, in place."""
        for maker in self.makers:
            _multiply_rows(maker, slice(None), factors)
        _divide_columns(self.readers, factors)

    def add(self, offsets: torch.Tensor) -> None:
        """Add `offsets` [K] fp64 to the channels, in place: softmax rows sum to one."""
        for maker in self.makers:
            maker.bias.copy_(maker.bias.double() + offsets)  # copy_ casts back
        _compensate(self.readers, offsets)


def sites_of(transformer: Any) -> list[Modulated | Values]:
    """The sites of all blocks, in order: of a Flux if it has single blocks, else of a DiT."""
    sites: list[Modulated | Values] = []
    if not hasattr(transformer, "single_transformer_blocks"):
        for block in transformer.transformer_blocks:
            sites += _dit_block(block)
        return sites
    for block in transformer.transformer_blocks:
        sites += _joint_block(block)
    for block in transformer.single_transformer_blocks:
        sites += _single_block(block)
    return sites


def _dit_block(block: Any) -> Iterator[Modulated | Values]:
    attention = block.attn1
    yield Modulated(block.norm1.linear, 0, (attention.to_q, attention.to_k, attention.to_v))
    yield Modulated(block.norm1.linear, 3, (block.ff.net[0].proj,))
    yield Values((attention.to_v,), (attention.to_out[0],))


def _joint_block(block: Any) -> Iterator[Modulated | Values]:
    image, text, attention = block.norm1.linear, block.norm1_context.linear, block.attn
    yield Modulated(image, 0, (attention.to_q, attention.to_k, attention.to_v))
    yield Modulated(image, 3, (block.ff.net[0].proj,))
    yield Modulated(text, 0, (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj))
    yield Modulated(text, 3, (block.ff_context.net[0].proj,))
    yield Values(
        (attention.to_v, attention.add_v_proj), (attention.to_out[0], attention.to_add_out)
    )


def _single_block(block: Any) -> Iterator[Modulated | Values]:
    attention = block.attn
    readers = (attention.to_q, attention.to_k, attention.to_v, block.proj_mlp)
    yield Modulated(block.norm.linear, 0, readers)
    yield Values((attention.to_v,), (block.proj_out,))  # it reads the MLP behind the attention


def _multiply_rows(linear: nn.Linear, rows: slice, factors: torch.Tensor) -> None:
    linear.weight[rows] = (linear.weight[rows].double() * factors[:, None]).to(linear.weight.dtype)
    linear.bias[rows] = (linear.bias[rows].double() * factors).to(linear.bias.dtype)


def _divide_columns(linears: tuple[nn.Linear, ...], factors: torch.Tensor) -> None:
    """Let linears take inputs that were multiplied by `factors` [K]."""
    for linear in linears:
        columns = linear.weight[:, : len(factors)]
        columns.copy_(columns.double() / factors)


def _compensate(linears: tuple[nn.Linear, ...], offsets: torch.Tensor) -> None:
    """Let linears take inputs to which `offsets` [K] were added: b - W v."""
    for linear in linears:
        product = linear.weight[:, : len(offsets)].double() @ offsets
        linear.bias.copy_(linear.bias.double() - product)

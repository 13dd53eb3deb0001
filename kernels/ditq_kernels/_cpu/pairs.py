"""Exact int8 products on processors that add pairs of products in int16: AVX2, and AVX512 without VNNI.

Their instruction (`vpmaddubsw`) takes unsigned activations and signed weights, and a pair of products that passes
int16 saturates. Activations are shifted to 0..255; then a pair is safe where its two weights sum to at most 128 in
magnitude. What a pair has above that moves to a copy of its first input, behind all others:

    w0 * x0 + w1 * x1 = (w0 - e) * x0 + w1 * x1  +  e * x0,    |w0 - e + w1| <= 128

Copies are pairs too, and may need copies in turn, at most half as many each time: weights grow to less than twice their
size, once, at the first use of a layer (normal weights to 1.5 times, codes spread evenly over int8 to 1.75). The
product is exact. oneDNN multiplies, and undoes the shift in int32.
"""

from dataclasses import dataclass

import torch

from ditq_kernels.codes import packing
from ditq_kernels.launch.prepared import prepared
from ditq_kernels.reference import linear as reference

PAIR_LIMIT = 128  # 255 * 128 < 2**15
SHIFT = 128  # from int8 to 0..255
EXACT_FP32 = 2**24  # oneDNN returns fp32: integers up to here are exact
CODES = (-128, 127)
# columns are a multiple: oneDNN halves 257 to 767 inputs, then takes four at a time, so pairs stay pairs
COLUMNS = 8


@dataclass(frozen=True)
class PairedWeights:
    """Weights in oneDNN's order, inputs in parts whose products fp32 holds exactly."""

    parts: tuple[torch.Tensor, ...]
    widths: tuple[int, ...]  # columns of the parts
    copied: torch.Tensor  # int64: inputs that have a copy behind all inputs
    every_second: int  # of the copies: so many, the first ones, are inputs 0, 2, 4 and so on


def product(q: torch.Tensor, weight: torch.Tensor, *groups: torch.Tensor) -> torch.Tensor:
    """`q @ weight.T` exactly, [T, N], contiguous and the caller's own: fp32 if it holds all sums, else int32.

    Args:
        q: [T, K] int8.
        weight: [N, K] int8; or [N, K / 2] uint8, progressive int4.
        groups: none; or the group scales [N, J] uint8 and offsets [N, J] int8.

    Raises:
        RuntimeError: oneDNN turns out not to be exact on this processor.
    """
    op = "gemm_w4a8" if groups else "gemm_w8a8"
    return _product(q, prepared(op, (weight, *groups), _prepare))


def _product(q: torch.Tensor, weights: PairedWeights) -> torch.Tensor:
    shifted = _shifted(q, weights)
    if len(weights.parts) == 1:
        return _multiply(shifted, weights.parts[0])
    columns = shifted.split(weights.widths, dim=1)
    first, *others = (_multiply(x, w).int() for x, w in zip(columns, weights.parts, strict=True))
    for other in others:
        first += other
    return first


def _shifted(q: torch.Tensor, weights: PairedWeights) -> torch.Tensor:
    """Codes + 128, and the copies behind them: [T, columns] uint8."""
    out = q.new_empty((len(q), sum(weights.widths)), dtype=torch.uint8)
    known = weights.every_second
    inputs, regular, others = out.tensor_split((q.shape[1], q.shape[1] + known), dim=1)
    torch.bitwise_xor(q.view(torch.uint8), SHIFT, out=inputs)
    regular.copy_(inputs[:, : 2 * known : 2])  # less than half the time of a gather
    torch.index_select(inputs, 1, weights.copied[known:], out=others)
    return out


def _multiply(shifted: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    # nothing here may depend on torch's default dtype and device
    one = torch.ones(1, dtype=torch.float32, device=shifted.device)
    zero = torch.zeros(1, dtype=torch.int32, device=shifted.device)
    return torch.ops.onednn.qlinear_pointwise(
        shifted.contiguous(), 1.0, SHIFT, part, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip


def _prepare(weight: torch.Tensor, *groups: torch.Tensor) -> PairedWeights:
    if groups:
        weight = packing.expand_w4p(weight, *groups)
    grown, copied = _with_copies(weight)
    widths = _widths(grown)
    parts = tuple(
        torch.ops.onednn.qlinear_prepack(part.contiguous(), None)
        for part in grown.split(widths, dim=1)
    )
    made = PairedWeights(parts, widths, copied, _every_second(copied, weight.shape[1]))
    _check(made, weight)
    return made


def _with_copies(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [N, columns] int8 none of whose pairs can saturate, and the inputs that the added columns copy."""
    inputs = torch.arange(in_features := weight.shape[1], device=weight.device)
    blocks, sources = [], []
    while weight.shape[1]:
        if weight.shape[1] % 2:  # pairs do not reach into the next block
            weight = torch.nn.functional.pad(weight, (0, 1))
            inputs = torch.cat([inputs, inputs[:1]])
        first, second = weight[:, 0::2].to(torch.int16), weight[:, 1::2]
        both = first + second
        excess = both - both.clamp(-PAIR_LIMIT, PAIR_LIMIT)
        blocks.append(torch.stack([first - excess, second], dim=2).flatten(1).to(torch.int8))
        sources.append(inputs)
        needed = excess.any(dim=0)
        weight, inputs = excess[:, needed].to(torch.int8), inputs[0::2][needed]
    grown, taken = torch.cat(blocks, dim=1), torch.cat(sources)
    missing = -grown.shape[1] % COLUMNS
    grown = torch.nn.functional.pad(grown, (0, missing))
    return grown, torch.cat([taken, taken[:1].expand(missing)])[in_features:]


def _every_second(copied: torch.Tensor, in_features: int) -> int:
    """How many leading copies are inputs 0, 2, 4 and so on."""
    regular = torch.arange(0, in_features, 2, device=copied.device)[: len(copied)]
    same = copied[: len(regular)] == regular
    return len(regular) if bool(same.all()) else int((~same).int().argmax())


def _widths(weight: torch.Tensor) -> tuple[int, ...]:
    """Columns of equal parts, pairs together, each with products that fp32 holds."""
    columns = weight.shape[1]
    magnitudes = weight.to(torch.int16).abs()
    for count in range(1, columns + 1):
        width = -(-columns // count // COLUMNS) * COLUMNS
        widths = tuple(min(width, columns - start) for start in range(0, columns, width))
        sums = [part.sum(1).max() for part in magnitudes.split(widths, dim=1)]
        if not sums or -CODES[0] * int(torch.stack(sums).max()) <= EXACT_FP32:
            return widths
    raise AssertionError("eight columns always fit")


def _check(weights: PairedWeights, weight: torch.Tensor) -> None:
    """Multiply codes that saturate every pair that can, in either direction.

    Raises:
        RuntimeError: a product is wrong.
    """
    low, high = CODES
    rows = torch.full((3, weight.shape[1]), high, dtype=torch.int8, device=weight.device)
    rows[1] = low
    rows[2, ::3] = low
    expected = reference.integer_matmul(rows, weight)
    together, alone = _product(rows, weights), _product(rows[:1], weights)  # oneDNN may go two ways
    if not (torch.equal(together.int(), expected) and torch.equal(alone.int(), expected[:1])):
        raise RuntimeError(
            "gemm on the CPU: oneDNN's int8 product is not exact on this processor; choose the backend "
            "'reference', and report the processor (`ditq doctor`)"
        )

"""The vocabulary of a family table: which producer feeds which linears, and what a fold may do there.

A site is one input shared by the linears that read it. Its smoothing factor s (activations / s, weight columns * s)
is folded into the producer where that is exact (SmoothQuant Eq. 3; PTQ4DiT Eq. 12; HTG Eq. 8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

TIMESTEP_GROUPS = "timestep_groups"  # name of the module in a block that finds its current group
BEHIND_GELU = "its input is the output of GELU, which no factor passes through"


def get_linear(module: nn.Module, name: str) -> nn.Linear:
    """The linear called `name`; ValueError if the module has none of that name."""
    try:
        found = module.get_submodule(name)
    except AttributeError:
        found = module
    if not isinstance(found, nn.Linear):
        raise ValueError(
            f"{type(module).__name__} has no linear {name}, which its family table lists"
        )
    return found


@dataclass(frozen=True)
class AdaLN:
    """Fold kinds K1 and K2: X = LN(h) * (1 + scale) + shift, both taken from a modulation of this block.

    Attributes:
        modulation: name inside the block of a modulation linear (K1), or of a table that is added to a modulation
            which all blocks share (K2); its rows come in chunks of width K.
        shift_chunk: which chunk of its rows is the shift.
        scale_chunk: which chunk of its rows is the scale.
    """

    modulation: str
    shift_chunk: int
    scale_chunk: int


@dataclass(frozen=True)
class ValueRows:
    """Fold kinds V and V|G: X = P V with softmax rows that sum to one, so a channel of V is a channel of X.

    Attributes:
        values: value projections inside the block; several where X mixes the tokens of several streams.
        rest: why the channels of X beyond those of V, if there are any, take no factor; None if there are none.
        takes_shift: false where weights do not sum to one (linear attention, rows that attend to nothing).
    """

    values: tuple[str, ...]
    rest: str | None = None
    takes_shift: bool = True


@dataclass(frozen=True)
class NormWeights:
    """Fold kind K5: X = norm(h) * weight + bias, all of it for this site alone.

    Attributes:
        norm: name inside the block of the norm.
        takes_shift: it has a bias.
    """

    norm: str
    takes_shift: bool


@dataclass(frozen=True)
class ProductRows:
    """Fold kind M: X = linear(h) * g(h), the linear factor of a gated MLP (SwiGLU, GEGLU); or the linear alone.

    A shift would be multiplied by g, so it takes none.

    Attributes:
        linear: name inside the block.
        start: its first row that makes X.
        stop: the row after its last that does.
    """

    linear: str
    start: int
    stop: int


@dataclass(frozen=True)
class OnTheFly:
    """No producer can absorb a transform exactly; the quantizer applies it.

    Attributes:
        reason: why, in words for `ditq inspect`.
        kind: `G` behind an activation function, `X` anything else, `-` a producer that no table describes.
        takes_shift: methods that shift may do it here, the quantizer subtracts. Not behind an activation and not on
            streams that the tables of DiT, PixArt, SD3 and Flux name: there they shift where their papers do.
    """

    reason: str
    kind: str = "G"
    takes_shift: bool = False


Producer = AdaLN | ValueRows | NormWeights | ProductRows | OnTheFly


class Rows(NamedTuple):
    """Neighbouring rows of a linear, table or norm inside the block, one for each channel of a site.

    Attributes:
        owner: its name.
        start: the first of them.
        multiplies: they emit the multiplier 1 + scale of the input, not the input: a factor changes them, a shift not.
    """

    owner: str
    start: int = 0
    multiplies: bool = False


def rows_of(producer: Producer, width: int) -> list[Rows]:
    """What a fold of a site of `width` channels changes; of V it may be fewer channels, the first."""
    match producer:
        case AdaLN(modulation, shift, scale):
            return [Rows(modulation, shift * width), Rows(modulation, scale * width, True)]
        case ValueRows(values):
            return [Rows(name) for name in values]
        case NormWeights(norm):
            return [Rows(norm)]
        case ProductRows(linear, start):
            return [Rows(linear, start)]
    return []


@dataclass(frozen=True)
class Site:
    """One linear input of a block.

    Attributes:
        name: short name, unique in the block.
        consumers: linears inside the block that read it; they share one smoothing factor.
        producer: what makes it, and so how a factor folds.
        streams: consumers that each read other tokens of it (image, text), so that all must be observed; by default
            they all read the same tensor and the first stands for them.
        timed: it follows the timestep, and its rows stand by sample; else a shift is one for all timesteps.
    """

    name: str
    consumers: tuple[str, ...]
    producer: Producer
    streams: tuple[str, ...] = ()
    timed: bool = True

    @property
    def observed(self) -> tuple[str, ...]:
        """Consumers whose inputs together are the whole site."""
        return self.streams or self.consumers[:1]

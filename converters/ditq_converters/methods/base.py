"""What a method is given and what it gives. Tensors in, tensors out; no modules, no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch

SHIFTS = ("none", "constant", "groups")  # what a site can be shifted by


@dataclass(frozen=True)
class Quantizers:
    """What a site's input and the weights of its readers are rounded to: what a search must imitate.

    Attributes:
        weights: `w8`, `w4p` or `w4g`; where readers differ, that of most outputs.
        group_size: input channels per group of `w4p` or `w4g`.
        symmetric: `w4g` without zero points.
        activations: `token`, `token_asym` or `static`.
    """

    weights: str = "w8"
    group_size: int = 64
    symmetric: bool = False
    activations: str = "token"


@dataclass(frozen=True)
class SiteData:
    """What is known about one linear input of a block.

    Attributes:
        name: of the site in its family table (`qkv`, `o_proj`, `fc1`, `fc2`).
        minimum: [T, K] fp32, per call (noisiest first) and channel, over all samples, CFG halves and tokens.
        maximum: [T, K] fp32.
        weight: [N, K] fp64, the weights of all linears that read the site, stacked.
        shifts: what it can be shifted by: `none`; `constant`, one shift for all calls (through V); `groups`, one per
            timestep group (AdaLN rows, or the quantizer).
        rows: [C, n, K] fp32, sampled input rows of the calls `row_calls`; None where none were recorded.
        row_calls: the calls that rows were sampled at.
        quantizers: what its input and weights are rounded to.
    """

    name: str
    minimum: torch.Tensor
    maximum: torch.Tensor
    weight: torch.Tensor
    shifts: str = "groups"
    rows: torch.Tensor | None = None
    row_calls: tuple[int, ...] = ()
    quantizers: Quantizers = Quantizers()

    def rows_after(
        self, transform: Transform, group_of_call: Sequence[int], only: int | None = None
    ) -> torch.Tensor:
        """The sampled rows as the linear will see them, (X - shift) / smooth.

        Args:
            transform: of this site.
            group_of_call: [T] timestep group of every call; may be empty where nothing is shifted per group.
            only: the one call to take rows of; None: all that have rows.

        Returns:
            [R, K] fp64.

        Raises:
            ValueError: there are no such rows.
        """
        rows, kept = self._kept(only)
        groups = [group_of_call[self.row_calls[i]] for i in kept] if group_of_call else []
        return transform.apply(rows[kept], groups).flatten(0, 1)

    def groups_of_rows(self, group_of_call: Sequence[int], only: int | None = None) -> torch.Tensor:
        """[R] int64: the timestep group of each of the rows of `rows_after`; 0 where there are no groups."""
        rows, kept = self._kept(only)
        groups = [group_of_call[self.row_calls[i]] if group_of_call else 0 for i in kept]
        return torch.tensor(groups).repeat_interleave(rows.shape[1])

    def _kept(self, only: int | None) -> tuple[torch.Tensor, list[int]]:
        """All sampled rows, and which of their calls are meant."""
        kept = [i for i, call in enumerate(self.row_calls) if only in (None, call)]
        if self.rows is None or not kept:
            raise ValueError(
                f"site {self.name!r} has no sampled rows; calibrate into a new folder with --rows 64"
            )
        return self.rows, kept

    @property
    def weight_absmax(self) -> torch.Tensor:
        """[K] fp64: largest |W[n, k]| over all outputs of all linears that read the site."""
        return self.weight.abs().amax(dim=0)

    @property
    def absmax(self) -> torch.Tensor:
        """[T, K] fp64: largest |x| per call and channel."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs()).double()


KINDS: dict[type, tuple[type, str]] = {  # of a default -> what may stand in its place
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
}


def check_kind(name: str, default: Any, value: Any) -> None:
    """ValueError for a value of another kind than the default, as far as that tells."""
    kind, told = KINDS.get(type(default), (object, ""))
    if not isinstance(value, kind) or (isinstance(value, bool) and type(default) in (int, float)):
        raise ValueError(f"{name} must be {told}, got {value!r}")


@dataclass(frozen=True)
class NoOptions:
    """A method without choices of its own."""


@dataclass(frozen=True)
class Transform:
    """What happens to one site: X -> (X - shift) / smooth.

    Attributes:
        smooth: [K] fp64 > 0, or None for 1.
        shift: [G, K] fp64 with G the block's number of groups, or [1, K] for one shift in all groups; None for 0.
    """

    smooth: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def apply(self, x: torch.Tensor, group_of_call: Sequence[int]) -> torch.Tensor:
        """(X - shift) / smooth in fp64.

        Args:
            x: [C, K] or [C, n, K] float, of C calls.
            group_of_call: [C] timestep group of these calls; not read where one shift serves all groups.

        Returns:
            fp64, the shape of x.
        """
        x = x.double()
        if self.shift is not None:
            shift = self.shift if len(self.shift) == 1 else self.shift[list(group_of_call)]
            x = x - (shift if x.dim() == 2 else shift[:, None])
        return x if self.smooth is None else x / self.smooth


@dataclass(frozen=True)
class BlockTransform:
    """What a method decides for one block.

    Attributes:
        sites: site name -> its transform; sites that are absent are left alone.
        group_of_call: [T] timestep group of every call, noisiest first: starts at 0, never falls, rises by at most 1.
    """

    sites: dict[str, Transform]
    group_of_call: tuple[int, ...]

    @property
    def num_groups(self) -> int:
        """G."""
        return max(self.group_of_call, default=0) + 1


@dataclass(frozen=True)
class Method:
    """A way to choose transforms. Packages bring their own through the entry-point group `ditq.methods`.

    Attributes:
        name: as in `--method`.
        source: paper and equation.
        needs_statistics: whether `transform` reads the calibration.
        transform: (sites of one block, options) -> transforms, a pure function; None: no transform at all.
        options: a frozen dataclass of the choices it reads, the defaults of its paper; `transform` gets an instance.
        needs_rows: whether `transform` reads sampled rows; an option `search` that is off takes that back.
        lora_rank: rank of the low-rank branch it comes with.
        on_the_fly: it also transforms inputs behind an activation function, and raw streams, which no producer can
            take a factor of.
        group_size: input channels per group of its 4-bit weights, unless a choice says otherwise.
        symmetric: its `w4g` weights have no zero points, unless a choice says otherwise.
        attention: what attention products become by default: `none`, `int8` or `bf16`.
        static_call: the one call whose range static activations take (Meta: 0); None: all calls.
        over_time: its shifts follow the timestep.
    """

    name: str
    source: str
    needs_statistics: bool
    transform: Callable[[Sequence[SiteData], Any], BlockTransform] | None
    options: type[Any] = NoOptions
    needs_rows: bool = False
    lora_rank: int = 0
    on_the_fly: bool = True
    static_call: int | None = None
    group_size: int = 64
    symmetric: bool = False
    attention: str = "none"
    over_time: bool = False

    @property
    def option_names(self) -> tuple[str, ...]:
        """Names of its own choices."""
        return tuple(field.name for field in fields(self.options))

    def options_from(self, chosen: dict[str, Any]) -> Any:
        """An instance of `options`.

        Raises:
            ValueError: a choice that the method does not have, or a value that it refuses.
        """
        unknown = sorted(set(chosen) - set(self.option_names))
        if unknown:
            has = ", ".join(self.option_names) or "none"
            raise ValueError(f"method {self.name} has no option {unknown[0]!r}; it has: {has}")
        for name, value in chosen.items():
            check_kind(f"option {name}", getattr(self.options(), name, None), value)
        return self.options(**chosen)

    def reads_rows(self, options: Any) -> bool:
        """Whether its transform reads sampled rows under these options."""
        return self.needs_rows and bool(getattr(options, "search", True))

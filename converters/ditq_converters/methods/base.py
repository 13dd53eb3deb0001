"""What a method is given and what it gives. Tensors in, tensors out; no modules, no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SiteData:
    """What is known about one linear input of a block.

    Attributes:
        name: of the site in its family table (`qkv`, `o_proj`, `fc1`, `fc2`).
        minimum: [T, K] fp32, per call (noisiest first) and channel, over all samples, CFG halves and tokens.
        maximum: [T, K] fp32.
        weight: [N, K] fp64, the weights of all linears that read the site, stacked.
        foldable: a producer can absorb a factor and a shift; otherwise only a factor, applied on the fly.
        grouped: its producer can take a shift per timestep group (AdaLN rows); through V a shift is one for all.
        rows: [C, n, K] fp32, sampled input rows of the calls `row_calls`; None where none were recorded.
        row_calls: the calls that rows were sampled at.
    """

    name: str
    minimum: torch.Tensor
    maximum: torch.Tensor
    weight: torch.Tensor
    foldable: bool = True
    grouped: bool = True
    rows: torch.Tensor | None = None
    row_calls: tuple[int, ...] = ()

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


@dataclass(frozen=True)
class Options:
    """The choices a method may read; those of its paper are the defaults.

    Attributes:
        alpha: migration strength of smoothing, s = a^alpha / w^(1 - alpha) (SmoothQuant Eq. 4).
        weights: `w8`, `w4p` or `w4g`: the weight quantizer a search must imitate.
        group_size: input channels per group of `w4p` or `w4g`.
        symmetric: `w4g` without zero points.
        activations: `token` or `static`: the activation quantizer a search must imitate.
        search: DiTAS: search alpha on its 21-point grid; otherwise take `alpha`.
        ssc: PTQ4DiT: weigh calls by Spearman's rho; otherwise take the middle call.
        shift: HTG: shift channels per timestep group.
        scale: HTG: scale channels.
        num_groups: HTG: timestep groups; None: max(1, T // 10).
        linkage: HTG: `ward`, `centroid`, `average` or `exact_dp`.
        ema: HTG: coefficient of the moving average of channel ranges.
    """

    alpha: float = 0.5
    weights: str = "w8"
    group_size: int = 64
    symmetric: bool | None = None
    activations: str = "token"
    search: bool = True
    ssc: bool = True
    shift: bool = True
    scale: bool = True
    num_groups: int | None = None
    linkage: str = "ward"
    ema: float = 0.99


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
        group_of_call: [T] timestep group of every call: starts at 0, never falls, rises by at most 1.
    """

    sites: dict[str, Transform]
    group_of_call: tuple[int, ...]

    @property
    def num_groups(self) -> int:
        """G."""
        return self.group_of_call[-1] + 1 if self.group_of_call else 1


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        name: as in `--method`.
        source: paper and equation.
        needs_statistics: whether `transform` reads the calibration.
        transform: (sites of one block, options) -> transforms; None: no transform at all.
        needs_rows: whether `transform` reads sampled rows.
        lora_rank: rank of the low-rank branch it comes with.
        on_the_fly: it also smooths sites that no producer can absorb a factor of.
        symmetric: its `w4g` weights have no zero points, unless a recipe says otherwise.
        attention: what attention products become by default: `none`, `int8` or `bf16` (see `Recipe.attention`).
        static_call: the one call whose range static activations take (Meta: 0); None: all calls.
    """

    name: str
    source: str
    needs_statistics: bool
    transform: Callable[[Sequence[SiteData], Options], BlockTransform] | None
    needs_rows: bool = False
    lora_rank: int = 0
    on_the_fly: bool = True
    static_call: int | None = None
    symmetric: bool = False
    attention: str = "none"

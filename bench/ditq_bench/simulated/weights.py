"""The rounded weights of one linear under a profile, before and after smoothing, with their low-rank branch."""

from __future__ import annotations

import torch

from ditq_bench.simulated.granularity import FoldedWeight, fake_quantize_weight
from ditq_bench.simulated.profiles import Profile
from ditq_converters.methods.alternating import alternate

COMMUTES = ("per_in_channel", "per_in_channel_code")  # Q(W diag(s)) = Q(W) diag(s)
FOLDED = "per_in_channel_folded"


class SimulatedWeight:
    """A weight W [N, K] fp64 on its way through a profile's quantizer Q.

    DiTAS splits the unsmoothed weight (Eq. 9), which is the same as splitting the smoothed one only where Q commutes
    with smoothing: elsewhere the smoothed weight is split, whatever the profile says.
    """

    def __init__(
        self, weight: torch.Tensor, profile: Profile, granularity: str, bits: int, rank: int
    ) -> None:
        """Split the weight at once where the split comes before smoothing."""
        self.weight, self._profile, self._granularity = weight, profile, granularity
        self._bits, self._rank = bits, rank
        self._split: tuple[torch.Tensor, torch.Tensor] | None = None
        if profile.branch_first and granularity in COMMUTES:
            self._split = self._with_branch(weight)

    @property
    def absmax(self) -> torch.Tensor:
        """[K]: largest |W[n, k]|, of the rounded part alone where DiTAS's code takes it there."""
        early = self._split is not None and self._profile.weight_rule == "ditas_code"
        source = self._split[0] if early and self._split else self.weight
        return source.abs().amax(dim=0)

    def searched(self, smooth: torch.Tensor) -> torch.Tensor:
        """[N, K] that a search multiplies smoothed inputs by: without a branch unless it came first."""
        if self._split is not None:
            return (self._split[0] + self._split[1]) * smooth
        if self._granularity == FOLDED:  # the factor cancels: nothing to search
            return FoldedWeight.of(self.weight, self._bits).dequantize() * smooth
        return self._rounded(self.weight * smooth)

    def final(self, smooth: torch.Tensor) -> torch.Tensor | FoldedWeight:
        """What smoothed inputs are multiplied by, branch included."""
        if self._granularity == FOLDED:
            return FoldedWeight.of(self.weight * smooth, self._bits)
        if self._split is not None:
            return self.searched(smooth)
        rounded, branch = self._with_branch(self.weight * smooth)
        return rounded + branch

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        return fake_quantize_weight(
            weight, self._granularity, self._bits, self._profile.weight_rule
        )

    def _with_branch(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rounded part and branch of the best iterate (Eq. 9-10)."""
        if not self._rank:
            return self._rounded(weight), torch.zeros_like(weight)
        split = alternate(weight, self._rounded, self._rank)
        return self._rounded(split.quantize_target), split.lora_up @ split.lora_down

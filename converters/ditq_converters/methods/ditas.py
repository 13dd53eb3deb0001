"""DiTAS (arXiv:2409.07756): temporal-aggregated smoothing, its strength searched on sampled rows.

We search with the quantizers that run. The paper's weights are quantized per input channel, which no integer GEMM can
rescale, and its activation range is taken anew for every call; ours are per output channel, and per token or static.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import ditq_kernels as k
from ditq_converters.methods import ranges
from ditq_converters.methods.base import BlockTransform, Method, Quantizers, SiteData, Transform
from ditq_converters.methods.smoothquant import check_fraction, smooth_factor

ALPHAS = tuple(m / 20 for m in range(21))


@dataclass(frozen=True)
class DitasOptions:
    """Choices of DiTAS.

    Attributes:
        search: search alpha on its 21-point grid; otherwise take `alpha`.
        alpha: migration strength, in [0, 1].
    """

    search: bool = True
    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Check the range."""
        check_fraction("alpha", self.alpha)


def factor(site: SiteData, alpha: float) -> torch.Tensor:
    """TAS, Eq. 4: s = a^alpha / w^(1 - alpha), a = the largest |x| over all calls; [K] fp64."""
    return smooth_factor(site.absmax.amax(dim=0), site.weight_absmax, alpha)


def grid_losses(site: SiteData) -> list[float]:
    """Eq. 8 at the 21 points of the grid: sum over rows of |Qa(x / s) Qw(W diag(s))^T - x W^T|^2.

    Args:
        site: with rows [C, n, K] fp32 and its quantizers.

    Returns:
        The loss at every alpha of `ALPHAS`; products are fp32, their squares are summed in fp64.

    Raises:
        ValueError: the site has no rows, or an unknown quantizer.
    """
    if site.rows is None:
        raise ValueError(
            f"ditas: site {site.name!r} has no sampled rows; calibrate with rows, or switch the search off"
        )
    rows = site.rows.reshape(-1, site.rows.shape[-1]).float()
    expected = rows @ site.weight.float().T
    losses = []
    for alpha in ALPHAS:
        smooth = factor(site, alpha)
        weight = _through_weight_quantizer(site.weight * smooth, site.quantizers)
        output = _through_activation_quantizer(rows, site, smooth) @ weight.T
        losses.append(float(output.sub_(expected).double().square_().sum()))
    return losses


def best_alpha(site: SiteData) -> float:
    """Algorithm 1: the alpha of least loss; the smallest of equals. Arguments and errors as `grid_losses`."""
    losses = grid_losses(site)
    return ALPHAS[losses.index(min(losses))]


def transform(sites: Sequence[SiteData], options: DitasOptions) -> BlockTransform:
    """Smooth every site, each with its own alpha."""
    transforms = {}
    for site in sites:
        alpha = best_alpha(site) if options.search else options.alpha
        transforms[site.name] = Transform(factor(site, alpha))
    return BlockTransform(transforms, (0,) * len(sites[0].minimum))


def _through_weight_quantizer(weight: torch.Tensor, quantizers: Quantizers) -> torch.Tensor:
    """[N, K] fp64 -> the real weights that run, [N, K] fp32."""
    if quantizers.weights == "w8":
        return k.quantize_weight_w8(weight).dequantize()
    if quantizers.weights == "w4p":
        group_size = k.resolve_group_size(weight.shape[1], quantizers.group_size)
        return k.quantize_weight_w4p(weight, group_size).dequantize()
    if quantizers.weights == "w4g":
        group_size = k.resolve_group_size(weight.shape[1], quantizers.group_size, one_group=True)
        return k.quantize_weight_w4g(weight, group_size, quantizers.symmetric).dequantize()
    raise ValueError(f"ditas: weights must be w8, w4p or w4g, got {quantizers.weights!r}")


def _through_activation_quantizer(
    rows: torch.Tensor, site: SiteData, smooth: torch.Tensor
) -> torch.Tensor:
    """Rows [R, K] fp32 -> the real smoothed activations that run, [R, K] fp32."""
    activations = site.quantizers.activations
    smoothed = rows * (1 / smooth).float()
    if activations == "token":
        codes, scale = k.quantize_per_token(smoothed)
        return k.dequantize(codes, scale[:, None])
    if activations == "token_asym":
        codes, scale, zero = k.quantize_per_token(smoothed, asymmetric=True)
        return k.dequantize(codes, scale[:, None], zero[:, None])
    if activations == "static":
        low, high = ranges.minmax(site.minimum.double() / smooth, site.maximum.double() / smooth)
        return ranges.through_quantizer(smoothed, low, high)
    raise ValueError(f"ditas: activations must be token, token_asym or static, got {activations!r}")


DITAS = Method(
    name="ditas",
    source="DiTAS, arXiv:2409.07756, Eq. 4 and 6-10, Alg. 1",
    needs_statistics=True,
    transform=transform,
    options=DitasOptions,
    needs_rows=True,
    lora_rank=32,
)

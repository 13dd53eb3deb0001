"""What the methods decide under the papers' quantizers: the parts that differ from the integer profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ditq_bench.simulated.profiles import Profile
from ditq_bench.simulated.rounding import RULES
from ditq_bench.simulated.weights import SimulatedWeight
from ditq_converters.methods import METHODS, BlockTransform, SiteData, Transform
from ditq_converters.methods.ditas import ALPHAS, DitasOptions
from ditq_converters.methods.ptq4dit import ALPHA, call_weights
from ditq_converters.methods.smoothquant import smooth_factor
from ditq_converters.plan.plan import Part

ACT_BITS = 8
SiteWeights = dict[str, list[SimulatedWeight]]  # site -> the weights of its readers


def block_transform(
    part: Part, profile: Profile, sites: Sequence[SiteData], weights: SiteWeights
) -> BlockTransform:
    """The transforms of one block.

    Args:
        part: its entries of the plan; one method for all that are transformed.
        profile: the simulated quantizers.
        sites: of the block, with rows.
        weights: read by DiTAS's search.
    """
    one_group = (0,) * len(sites[0].minimum)
    given = [site for site in sites if part.sites[site.name].transforms]
    if not given:
        return BlockTransform({}, one_group)
    entry = part.sites[given[0].name]
    options, transform = entry.method_options, METHODS[entry.method].transform
    assert transform is not None
    if entry.method == "ditas":
        factors = {site.name: _ditas_factor(site, profile, options, weights) for site in given}
    elif entry.method == "ptq4dit" and profile.ssc_unit == "row":
        factors = {site.name: _row_factor(site) for site in given}
    else:  # nothing is folded here, so the shift behind V may follow the groups as well
        return transform([replace(site, shifts="groups") for site in given], options)
    return BlockTransform({name: Transform(s) for name, s in factors.items()}, one_group)


def search_losses(
    site: SiteData,
    profile: Profile,
    factor: Callable[[float], torch.Tensor],
    weight_of: Callable[[torch.Tensor], torch.Tensor],
) -> list[float]:
    """DiTAS Eq. 8 at every alpha, with a range per tensor and call, which the statistics give exactly.

    Args:
        site: with rows.
        profile: `act_rule` and `search_calls`.
        factor: alpha -> s [K] fp64.
        weight_of: s -> the rounded weight [N, K] fp64 that smoothed inputs meet.

    Returns:
        The mean over calls of |Qa(x / s) Qw(W diag(s))^T - x W^T|^2.
    """
    assert site.rows is not None
    rule, used = RULES[profile.act_rule], list(enumerate(site.row_calls))
    if profile.search_calls is not None:
        used = used[: profile.search_calls]
    losses = []
    for alpha in ALPHAS:
        smooth, loss = factor(alpha), 0.0
        weight = weight_of(smooth)
        for i, call in used:
            rows = site.rows[i].double()
            low = (site.minimum[call].double() / smooth).min()
            high = (site.maximum[call].double() / smooth).max()
            output = rule(rows / smooth, low, high, ACT_BITS) @ weight.T
            loss += float((output - rows @ site.weight.T).square().sum())
        losses.append(loss / len(used))
    return losses


def _ditas_factor(
    site: SiteData, profile: Profile, options: DitasOptions, weights: SiteWeights
) -> torch.Tensor:
    a = site.absmax.amax(dim=0)
    w = torch.stack([weight.absmax for weight in weights[site.name]]).amax(dim=0)

    def factor(alpha: float) -> torch.Tensor:
        return smooth_factor(a, w, alpha)

    def weight_of(smooth: torch.Tensor) -> torch.Tensor:
        return torch.cat([weight.searched(smooth) for weight in weights[site.name]])

    if not options.search:
        return factor(options.alpha)
    losses = search_losses(site, profile, factor, weight_of)
    return factor(ALPHAS[losses.index(min(losses))])


def _row_factor(site: SiteData) -> torch.Tensor:
    """PTQ4DiT's code weighs samples, not calls; of those calibration keeps rows (Eq. 10-11)."""
    assert site.rows is not None
    salience = site.rows.double().abs().flatten(0, 1)  # [R, K]
    eta = call_weights(salience, site.weight_absmax)
    return smooth_factor((eta[:, None] * salience).sum(dim=0), site.weight_absmax, ALPHA)

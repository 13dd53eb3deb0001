"""The quantizers of the papers (`paper`) and of their released code (`code`), as far as they differ from ours.

Left out of every profile, and so not reproduced: reconstruction by training (AdaRound, learned steps), and the
quantized attention products of PTQ4DiT and HTG.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """One column of the papers' settings.

    Attributes:
        activations: `dynamic_tensor` (one range per call over the whole batch) or `static_tensor`.
        act_rule: a name of `simulated.rounding.RULES`, for activations.
        granularity: of the weights at 8 and at 4 bits, names of `simulated.granularity.GRANULARITIES`.
        weight_rule: the same, for weights.
        range_method: of static activations, a name of `methods.ranges.RANGE_METHODS`.
        branch_first: the low-rank split takes the unsmoothed weight, before the search (DiTAS Eq. 9 and its code);
            otherwise the smoothed one.
        search_calls: the alpha search reads this many calls from the first; None: all.
        ssc_unit: PTQ4DiT weighs `call`s, or sampled `row`s as its code does with samples.
        modulation: AdaLN linears are quantized too, weight-only, per output channel.
    """

    activations: str
    act_rule: str = "asymmetric"
    granularity: tuple[str, str] = ("per_out_channel", "per_out_channel")
    weight_rule: str = "asymmetric"
    range_method: str = "minmax"
    branch_first: bool = False
    search_calls: int | None = None
    ssc_unit: str = "call"
    modulation: bool = True

    def granularity_at(self, bits: int) -> str:
        """Who shares a weight range at 8 or 4 bits."""
        return self.granularity[0 if bits == 8 else 1]


PROFILES: dict[tuple[str, str], Profile] = {
    # Yang et al., An Analysis on Quantizing Diffusion Transformers, Eq. 1, Alg. 1
    ("meta", "paper"): Profile(
        "static_tensor", "symmetric", ("per_out_channel", "group_k"), "symmetric"
    ),
    # arXiv:2409.07756, section 3 and Alg. 1
    ("ditas", "paper"): Profile(
        "dynamic_tensor",
        granularity=("per_in_channel", "per_in_channel"),
        branch_first=True,
        modulation=False,
    ),
    # the code released with it
    ("ditas", "code"): Profile(
        "dynamic_tensor",
        "ditas_code",
        ("per_in_channel_code", "per_in_channel_code"),
        "ditas_code",
        branch_first=True,
        search_calls=50,
        modulation=False,
    ),
    # arXiv:2405.16005; ranges follow Q-Diffusion, arXiv:2302.04304
    ("ptq4dit", "paper"): Profile("static_tensor", range_method="qdiff_mse"),
    ("ptq4dit", "code"): Profile("static_tensor", range_method="ptq4dit_pct", ssc_unit="row"),
    # arXiv:2503.06930; no code is public
    ("htg", "paper"): Profile("static_tensor", range_method="qdiff_mse"),
}


def profile_of(method: str, name: str) -> Profile:
    """The simulated quantizers of a method; ValueError lists what there is."""
    if (method, name) not in PROFILES:
        there = ", ".join(f"{method} {name}" for method, name in PROFILES)
        raise ValueError(
            f"profile: {method} has no {name!r} profile to simulate; there are: {there}"
        )
    return PROFILES[method, name]

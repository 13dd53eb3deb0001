"""Blocks whose image and text tokens attend to each other (MMDiT, arXiv:2403.03206): what SD3 and Flux share.

Attention reads the values of both streams, so both output projections see mixtures of both: `to_v` and `add_v_proj`
carry one factor and one shift, and `to_out.0` and `to_add_out` take them back.
"""

from __future__ import annotations

from ditq_runtime.families.sites import BEHIND_GELU, AdaLN, OnTheFly, Site, ValueRows


def joint_sites(
    context_shift: int = 0, context_scale: int = 1, ends: bool = False
) -> tuple[Site, ...]:
    """The sites of a block with two streams.

    Args:
        context_shift: chunk of `norm1_context.linear` that is the shift.
        context_scale: chunk of `norm1_context.linear` that is the scale.
        ends: the text stream ends here: it has no output projection and no MLP.
    """
    context = AdaLN("norm1_context.linear", context_shift, context_scale)
    outputs = ("attn.to_out.0",) if ends else ("attn.to_out.0", "attn.to_add_out")
    values = ValueRows(("attn.to_v", "attn.add_v_proj"))
    sites = [
        Site("qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), AdaLN("norm1.linear", 0, 1)),
        Site("qkv_context", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), context),
        Site("o_proj", outputs, values, streams=outputs),
        *mlp_sites("", AdaLN("norm1.linear", 3, 4)),
    ]
    if not ends:
        sites += mlp_sites("_context", AdaLN("norm1_context.linear", 3, 4))
    return tuple(sites)


def mlp_sites(stream: str, producer: AdaLN) -> tuple[Site, Site]:
    """Both linears of the MLP of a stream: `` or `_context`."""
    return (
        Site(f"fc1{stream}", (f"ff{stream}.net.0.proj",), producer),
        Site(f"fc2{stream}", (f"ff{stream}.net.2",), OnTheFly(BEHIND_GELU)),
    )

"""A tiny configuration of the class that draws proteins: a point and a latent for each residue."""

from __future__ import annotations

from typing import Any

import torch

from ditq_bench.zoo.tiny import TEXT, WIDTH, Draw, Tiny


def _proteina(draw: Draw) -> dict[str, Any]:
    """TEXT residues: a point and a latent each, both noisy, with a timestep for each of the two."""
    whole = torch.ones(draw.batch, TEXT, dtype=torch.bool)
    return {
        "bb_ca": draw.normal(TEXT, 3),
        "local_latents": draw.normal(TEXT, WIDTH),
        "bb_ca_time": draw.times(),
        "local_latents_time": draw.times() / 2,
        "padding_mask": draw.mask(),
        "token_type": draw.integers(7, TEXT),
        "conditioning": {"is_in_context_conditioning": ~whole, "supports_local_latent": whole},
    }


_TIMES = ("time_emb_bb_ca", "time_emb_local_latents")
OTHER = [
    Tiny("RFD4ProteinaTransformer", {
        "nlayers": 2, "token_dim": WIDTH, "nheads": 2, "dim_cond": WIDTH, "pair_repr_dim": WIDTH, "latent_dim": WIDTH,
        "token_type_emb_dim": WIDTH, "t_emb_dim": WIDTH, "seq_sep_dim": WIDTH, "xt_pair_dist_dim": WIDTH,
        "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"), "feats_cond_seq": _TIMES,
        "feats_pair_repr": ("xt_bb_ca_pair_dists",), "feats_pair_cond": _TIMES, "tri_mult_c": WIDTH,
        "num_sequence_classes": WIDTH,
    }, _proteina, ("bb_ca_time", "local_latents_time")),
]  # fmt: skip

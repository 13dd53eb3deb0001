"""The demo transformer: its configuration, and the small form in which it is stored.

Stock diffusers gives each block its own timestep and label embedder, each with a table of 1001
labels, because `DiTPipeline` hard-codes label 1000 as "no class". Here all blocks share one
embedder, and only 11 labels are ever trained: the digits 0..9 and "no class". The compact form
stores that one embedder with 11 rows. `expand` copies it into every block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

NUM_CLASSES = 10
NULL_LABEL = 1000  # DiTPipeline's hard-coded label of the unconditional half
NUM_LAYERS = 6

TRANSFORMER_CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,  # explicit: DiTPipeline compares it with in_channels to find learned sigmas
    "num_layers": NUM_LAYERS,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": NULL_LABEL,
    "norm_num_groups": 32,
}

SCHEDULER_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}

_SHARED = "embedder."
_LABEL_TABLE = "class_embedder.embedding_table.weight"


def build_transformer() -> DiTTransformer2DModel:
    """Build the demo transformer in eval mode, with diffusers' random weights (fp32).

    In train mode every block drops labels on its own, so the demo is trained in eval mode too.
    """
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(**TRANSFORMER_CONFIG).eval()


def build_scheduler() -> DDIMScheduler:
    """Build the DDIM scheduler (arXiv:2010.02502) with the noise schedule of the training."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**SCHEDULER_CONFIG)


def tie_embedders(transformer: DiTTransformer2DModel) -> None:
    """Let every block use block 0's timestep and label embedder, in place."""
    blocks = transformer.transformer_blocks
    for block in blocks[1:]:
        block.norm1.emb = blocks[0].norm1.emb


def compact(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop what `expand` can restore from a tied transformer's state dict.

    Args:
        state: a full state dict in which all blocks hold equal embedders.

    Returns:
        The state with one embedder under `embedder.`, its label table cut to [11, 128]: digits
        0..9, then the null label.

    Raises:
        ValueError: a block's embedder differs from block 0's.
    """
    small = {}
    for key, tensor in state.items():
        layer, _, name = key.partition(".norm1.emb.")
        if not name:
            small[key] = tensor
            continue
        first = state[f"transformer_blocks.0.norm1.emb.{name}"]
        if not torch.equal(tensor, first):
            raise ValueError(f"compact: {key} differs from block 0's; tie the embedders first")
        if layer == "transformer_blocks.0":
            small[_SHARED + name] = tensor
    table = small[_SHARED + _LABEL_TABLE]
    small[_SHARED + _LABEL_TABLE] = torch.cat([table[:NUM_CLASSES], table[NULL_LABEL:]])
    return small


def expand(small: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rebuild the full state dict from the compact one: the inverse of `compact`.

    Labels 10..999 were never trained. Their rows are copies of the null row, so that asking for
    one gives an unconditional digit and not noise.

    Args:
        small: what `compact` returned.

    Returns:
        A state dict for `build_transformer()`; blocks hold equal but separate embedders, with
        label tables of [1001, 128].
    """
    state = {key: value for key, value in small.items() if not key.startswith(_SHARED)}
    shared = {k.removeprefix(_SHARED): v for k, v in small.items() if k.startswith(_SHARED)}
    rows = torch.full((NULL_LABEL + 1,), NUM_CLASSES)
    rows[:NUM_CLASSES] = torch.arange(NUM_CLASSES)
    shared[_LABEL_TABLE] = shared[_LABEL_TABLE][rows]
    for layer in range(NUM_LAYERS):
        for name, tensor in shared.items():
            state[f"transformer_blocks.{layer}.norm1.emb.{name}"] = tensor.clone()
    return state

"""A tiny random DiT to simulate methods on."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

CONFIG = {
    "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip


@pytest.fixture(scope="session")
def make_dit():
    """2 blocks, 64 wide, AdaLN far from its zero initialization."""

    def make(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DiTTransformer2DModel(**CONFIG).eval()
            for block in model.transformer_blocks:
                torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
                torch.nn.init.normal_(block.norm1.linear.bias, std=0.4)
        return model.requires_grad_(False)

    return make

"""What the DiT learns: to predict the noise (arXiv:2006.11239), from DiT's initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from ditq_converters.demo.architecture import (
    NULL_LABEL,
    build_scheduler,
    build_transformer,
    tie_embedders,
)

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel


@torch.no_grad()
def xavier(model: nn.Module) -> None:
    """Set linears and convolutions to Xavier-uniform weights and zero biases, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def initialise(transformer: DiTTransformer2DModel, seed: int) -> None:
    """Set the initial weights of DiT (arXiv:2212.09748, section 3.2), in place.

    Xavier-uniform linears and patch embedding, N(0, 0.02) time and label embeddings, and zeros in
    the modulation and output layers, so that every block starts as the identity.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        xavier(transformer)
        embedder = transformer.transformer_blocks[0].norm1.emb
        nn.init.normal_(embedder.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
        modulations = [block.norm1.linear for block in transformer.transformer_blocks]
        for linear in [*modulations, transformer.proj_out_1, transformer.proj_out_2]:
            nn.init.zeros_(linear.weight)


class NoisePrediction:
    """The mean squared error of the predicted noise (arXiv:2006.11239, Eq. 14), at uniform timesteps."""

    initial_loss = 1.0  # the zero output of step 0 against noise of variance 1

    def __init__(self) -> None:
        """Take the noise schedule of the demo's scheduler."""
        self._scheduler = build_scheduler()

    def build(self, seed: int) -> DiTTransformer2DModel:
        """Build the demo transformer, its embedders tied."""
        transformer = build_transformer()
        tie_embedders(transformer)
        initialise(transformer, seed)
        return transformer

    def loss(
        self,
        transformer: DiTTransformer2DModel,
        clean: torch.Tensor,
        labels: torch.Tensor,
        dropped: torch.Tensor,
        rng: torch.Generator,
    ) -> torch.Tensor:
        """See `ditq_converters.demo.trainer.Objective`; dropped labels become the null label."""
        timesteps = torch.randint(1000, labels.shape, generator=rng)
        noise = torch.randn(clean.shape, generator=rng)
        noisy = self._scheduler.add_noise(clean, noise, timesteps)
        labels = labels.masked_fill(dropped, NULL_LABEL)
        predicted = transformer(noisy, timestep=timesteps, class_labels=labels).sample
        return F.mse_loss(predicted, noise)

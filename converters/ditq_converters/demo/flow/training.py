"""What the flow model learns: the velocity of rectified flow, under prompts of any padded length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from ditq_converters.demo.digits import DIGIT_NAMES
from ditq_converters.demo.flow.architecture import build_transformer
from ditq_converters.demo.flow.pipeline import assemble
from ditq_converters.demo.flow.text import NO_PROMPT, TEMPLATES, TRAINED_TOKENS, draw_encoders
from ditq_converters.demo.noise_prediction import xavier

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

SHORTEST, LONGEST = 6, 512  # tokens that a pipeline may pad a prompt to


@torch.no_grad()
def initialise(transformer: FluxTransformer2DModel, seed: int) -> None:
    """Set the initial weights as DiT does (arXiv:2212.09748, section 3.2), in place.

    Xavier-uniform linears, N(0, 0.02) time embedding, and zeros in the modulation and output layers,
    so that every block starts as the identity.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        xavier(transformer)
        embedder = transformer.time_text_embed.timestep_embedder
        nn.init.normal_(embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.linear_2.weight, std=0.02)
        for block in transformer.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1_context.linear.weight)
        for block in transformer.single_transformer_blocks:
            nn.init.zeros_(block.norm.linear.weight)
        nn.init.zeros_(transformer.norm_out.linear.weight)
        nn.init.zeros_(transformer.proj_out.weight)


class RectifiedFlow:
    """The mean squared error of the velocity `noise - clean` (arXiv:2209.03003, Eq. 1), at uniform sigmas.

    A digit's prompt is drawn from `TEMPLATES`, the empty prompt stands for a dropped one. Each sample
    also draws the length that its prompt is padded to, log-uniform; only `TRAINED_TOKENS` are computed,
    and the logits of their paddings get log(paddings there / paddings here).
    """

    initial_loss = 1.7  # the zero output of step 0: 1 for the noise, 0.7 for the pixels

    @torch.no_grad()
    def __init__(self, seed: int) -> None:
        """Draw the text encoders and encode every prompt once, as the pipeline does."""
        self.encoders = draw_encoders(seed)
        pipe = assemble(build_transformer(), self.encoders)
        prompts = [form.format(name) for name in DIGIT_NAMES for form in TEMPLATES] + [NO_PROMPT]
        self._text, self._pooled, self._text_ids = pipe.encode_prompt(
            prompts, max_sequence_length=TRAINED_TOKENS
        )
        tokens = pipe.tokenizer_2(prompts, padding="max_length", max_length=TRAINED_TOKENS)
        self._padding = torch.tensor(tokens.attention_mask) == 0  # [prompts, TRAINED_TOKENS]
        self._pack, self._image_ids = pipe._pack_latents, pipe._prepare_latent_image_ids

    def build(self, seed: int) -> FluxTransformer2DModel:
        """Build the transformer with its initial weights."""
        transformer = build_transformer()
        initialise(transformer, seed)
        return transformer

    def loss(
        self,
        transformer: FluxTransformer2DModel,
        clean: torch.Tensor,
        labels: torch.Tensor,
        dropped: torch.Tensor,
        rng: torch.Generator,
    ) -> torch.Tensor:
        """See `ditq_converters.demo.trainer.Objective`."""
        form = torch.randint(len(TEMPLATES), labels.shape, generator=rng)
        prompts = (labels * len(TEMPLATES) + form).masked_fill(dropped, len(self._text) - 1)
        sigmas = torch.rand(labels.shape, generator=rng)
        noise = torch.randn(clean.shape, generator=rng)
        length = torch.rand(labels.shape, generator=rng)
        length = SHORTEST * (LONGEST / SHORTEST) ** length

        noisy = torch.lerp(clean, noise, sigmas[:, None, None, None])
        height, width = clean.shape[-2:]
        predicted = transformer(
            hidden_states=self._pack(noisy, *clean.shape),
            timestep=sigmas,
            encoder_hidden_states=self._text[prompts],
            pooled_projections=self._pooled[prompts],
            txt_ids=self._text_ids,
            img_ids=self._image_ids(1, height // 2, width // 2, "cpu", clean.dtype),
            joint_attention_kwargs={
                "attention_mask": _weigh(self._padding[prompts], length, height * width // 4)
            },
        ).sample
        return F.mse_loss(predicted, self._pack(noise - clean, *clean.shape))


def _weigh(padding: torch.Tensor, length: torch.Tensor, image_tokens: int) -> torch.Tensor:
    """What to add to the logits of the keys, for paddings to weigh as those of a longer prompt.

    Args:
        padding: [N, T] bool: which of the T text tokens are paddings, at least one in every row.
        length: [N] tokens of the longer prompt, at least T; need not be whole.
        image_tokens: keys after the text.

    Returns:
        [N, 1, 1, T + image_tokens]; zero but for paddings.
    """
    here = padding.sum(1)
    there = length - (padding.shape[1] - here)
    bias = padding * (there / here).log()[:, None]
    return F.pad(bias, (0, image_tokens))[:, None, None]

"""The flow model's text side: two tokenizers of a few words, and two tiny frozen encoders.

`FluxPipeline` takes a CLIP for one pooled vector and a T5 for a sequence. Both are the real classes
with random weights that are never trained; only the transformer learns what they say.

The T5 has no layers: a token becomes its embedding, normed. So all paddings are the same vector, at
the same rotary position (Flux gives text none), and n of them act on attention as one with log n
added to its logit. That is how the model is trained for every `max_sequence_length` at the price of
`TRAINED_TOKENS` (see `training.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ditq_converters.demo.digits import DIGIT_NAMES

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

TEXT_WIDTH = 64
TEMPLATES = ("{}", "a {}", "the digit {}")  # a digit's prompts; others are read, but not trained
NO_PROMPT = ""  # what dropped prompts become, and what `negative_prompt` should be
TRAINED_TOKENS = 5  # the longest prompt, its end and one padding

_WORDS = ("a", "the", "digit", *DIGIT_NAMES)
_CLIP_TOKENS = 16


def _byte_pairs(words: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary and merges, by which each word grows from the left to one token."""
    vocabulary: dict[str, int] = {}
    merges: list[tuple[str, str]] = []
    for word in words:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        grown = letters[0]
        for piece in letters:
            vocabulary.setdefault(piece, len(vocabulary))
        for letter in letters[1:]:
            if (grown, letter) not in merges:
                merges.append((grown, letter))
            grown += letter
            vocabulary.setdefault(grown, len(vocabulary))
    for special in ("<unk>", "<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return vocabulary, merges


def build_tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Build CLIP's and T5's tokenizer: one token for each known word, "<unk>" for what is left."""
    from transformers import CLIPTokenizer, T5Tokenizer

    vocabulary, merges = _byte_pairs(_WORDS)
    clip = CLIPTokenizer(
        vocab=vocabulary, merges=merges, unk_token="<unk>", model_max_length=_CLIP_TOKENS
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in _WORDS]
    return clip, T5Tokenizer(vocab=pieces, extra_ids=0)


def build_encoders() -> tuple[CLIPTextModel, T5EncoderModel]:
    """Build CLIP's and T5's encoder in eval mode (fp32), to be given weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_tokenizer, t5_tokenizer = build_tokenizers()
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=_CLIP_TOKENS,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 2,
        d_ff=TEXT_WIDTH,
        num_heads=2,
        num_layers=0,
    )
    return CLIPTextModel(clip).eval(), T5EncoderModel(t5).eval()


@torch.no_grad()
def draw_encoders(seed: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Build both encoders with random weights that keep activations near 1, exact in fp16.

    N(0, 1) embeddings, N(0, 1 / in_features) linears, zero biases, norms as they are.
    """
    rng = torch.Generator().manual_seed(seed)
    encoders = build_encoders()
    for encoder in encoders:
        for module in encoder.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                fan_in = module.in_features if isinstance(module, nn.Linear) else 1
                drawn = torch.randn(module.weight.shape, generator=rng) / fan_in**0.5
                module.weight.copy_(drawn.half())
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
    return encoders

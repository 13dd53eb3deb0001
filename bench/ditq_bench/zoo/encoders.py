"""Tiny text encoders with their tokenizers, made without files: one token a letter or a byte, two layers, random."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers.pre_tokenizers import ByteLevel

from ditq_bench.zoo.tiny import WIDTH

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_SMALL = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2}
_GEMMA_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": WIDTH // 2}


def _t5_tokenizer() -> Any:
    """The first ids are those that T5 gives pad, end and unknown."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in LETTERS]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)


def t5(family: str = "T5", tokenizer: Any = None) -> tuple[Any, Any]:
    """(tokenizer, encoder) of T5 or UMT5."""
    tokenizer = tokenizer or _t5_tokenizer()
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=32, d_ff=WIDTH, num_layers=2, num_heads=2
    )
    return tokenizer, getattr(transformers, f"{family}EncoderModel")(config)


def byt5() -> tuple[Any, Any]:
    """(tokenizer of bytes, T5 encoder)."""
    return t5(tokenizer=transformers.ByT5Tokenizer())


def clip(kind: type = transformers.CLIPTextModel, width: int = WIDTH) -> tuple[Any, Any]:
    """(tokenizer, CLIP text encoder of class `kind`)."""
    letters = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    pieces = [*letters, "<|startoftext|>", "<|endoftext|>"]
    begin, end = len(letters), len(letters) + 1
    config = transformers.CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=width, intermediate_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=width, bos_token_id=begin, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    return tokenizer, kind(config)


def _pieces(*special: str) -> dict[str, int]:
    return {piece: i for i, piece in enumerate([*special, "▁", *LETTERS])}


def llama(kind: type = transformers.LlamaModel) -> tuple[Any, Any]:
    """(tokenizer, Llama of class `kind`)."""
    vocabulary = _pieces("<unk>", "<s>", "</s>")
    tokenizer = transformers.LlamaTokenizer(
        vocab=vocabulary, merges=[], add_bos_token=True, pad_token="</s>", model_max_length=128
    )
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), pad_token_id=2, **_SMALL, **_HEADS
    )
    return tokenizer, kind(config)


def _gemma_tokenizer() -> Any:
    vocabulary = _pieces("<pad>", "<eos>", "<bos>", "<unk>")
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)


def gemma(family: str = "Gemma2") -> tuple[Any, Any]:
    """(tokenizer, model) of Gemma or Gemma2."""
    tokenizer = _gemma_tokenizer()
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), **_GEMMA_IDS, **_SMALL, **_HEADS
    )
    return tokenizer, getattr(transformers, f"{family}Model")(config)


def gemma3() -> tuple[Any, Any]:
    """(tokenizer, Gemma3 with its vision tower)."""
    tokenizer = _gemma_tokenizer()
    text = {**_SMALL, **_HEADS, "vocab_size": len(tokenizer), **_GEMMA_IDS}
    vision = {
        "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    return tokenizer, transformers.Gemma3ForConditionalGeneration(config)


def byte_tokenizer(*special: str) -> Any:
    """A tokenizer of Qwen's kind: one token a byte, a few special ones, and a plain chat template."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *special)
    pieces = [*special, *sorted(ByteLevel.alphabet())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=[], additional_special_tokens=list(special)
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(kind: type = transformers.Qwen3Model) -> tuple[Any, Any]:
    """(tokenizer of bytes, Qwen3 of class `kind`)."""
    tokenizer = byte_tokenizer()
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=2,
        **_SMALL,
        **_HEADS,
    )
    return tokenizer, kind(config)


def glm() -> tuple[Any, Any]:
    """(tokenizer of bytes, GLM)."""
    tokenizer = byte_tokenizer()
    config = transformers.GlmConfig(
        vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, **_SMALL, **_HEADS
    )
    return tokenizer, transformers.GlmModel(config)


VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen25_text() -> tuple[Any, Any]:
    """(tokenizer of bytes, the language model of Qwen2.5-VL)."""
    tokenizer = byte_tokenizer(*VISION)
    return tokenizer, transformers.Qwen2_5_VLTextModel(_qwen25(tokenizer).text_config)


def qwen25() -> tuple[Any, Any]:
    """(tokenizer of bytes, Qwen2.5-VL with its vision tower)."""
    tokenizer = byte_tokenizer(*VISION)
    return tokenizer, transformers.Qwen2_5_VLForConditionalGeneration(_qwen25(tokenizer))


def _qwen25(tokenizer: Any) -> Any:
    """A third of each head's channels turns with time, height and width each."""
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION))
    text = {
        **_SMALL, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH,
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=video,
        vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip


def qwen3_vl() -> tuple[Any, Any]:
    """(tokenizer of bytes, Qwen3-VL with its vision tower)."""
    tokenizer = byte_tokenizer(*VISION)
    text = {
        **_SMALL, **_HEADS, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH,
        "patch_size": 4, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    return tokenizer, transformers.Qwen3VLModel(config)

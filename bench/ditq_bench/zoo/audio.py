"""Tiny configurations of the classes that draw sound."""

from __future__ import annotations

from typing import Any

from diffusers.models.embeddings import get_1d_rotary_pos_embed

from ditq_bench.zoo.tiny import GROUPED, HEADS, WIDTH, Draw, Tiny

LENGTH = 16  # latents of a sound


def _latents(draw: Draw, channels_first: bool = True) -> dict[str, Any]:
    shape = (WIDTH, LENGTH) if channels_first else (LENGTH, WIDTH)
    return {
        "hidden_states": draw.normal(*shape),
        "encoder_hidden_states": draw.text(),
        "timestep": draw.times(),
    }


def _ace_step(draw: Draw) -> dict[str, Any]:
    """Two timesteps (equal unless the model is a mean flow), and the sound that is given."""
    times = draw.times()
    return {
        **_latents(draw, channels_first=False),
        **{"timestep": times, "timestep_r": times / 2},
        "encoder_hidden_states": draw.text(2 * WIDTH),
        "context_latents": draw.normal(LENGTH, 2 * WIDTH),
    }


def _longcat(draw: Draw) -> dict[str, Any]:
    return {
        **_latents(draw, channels_first=False),
        "encoder_attention_mask": draw.mask(),
        "attention_mask": draw.mask(LENGTH),
        "latent_cond": draw.normal(LENGTH, WIDTH),
    }


def _stable_audio(draw: Draw) -> dict[str, Any]:
    """Half of a head's channels turn; one token for the length of the sound comes first."""
    turns = get_1d_rotary_pos_embed(16, LENGTH + 1, use_real=True, repeat_interleave_real=False)
    return {
        **_latents(draw),
        "global_hidden_states": draw.normal(1, 2 * WIDTH),
        "rotary_embedding": turns,
    }


def _stable_audio_3(draw: Draw) -> dict[str, Any]:
    return {
        **_latents(draw),
        "global_hidden_states": draw.normal(WIDTH),
        "encoder_attention_mask": draw.mask(),
        "local_add_cond": draw.normal(WIDTH, LENGTH),
    }


def _t5_film(draw: Draw) -> dict[str, Any]:
    """Notes and the sound before, both encoded, each with its mask."""
    encoded = [(draw.text(), draw.mask().float()) for _ in range(2)]
    return {
        "encodings_and_masks": encoded,
        "decoder_input_tokens": draw.normal(LENGTH, WIDTH),
        "decoder_noise_time": draw.times(),
    }


# class, configuration, arguments of forward, timestep
_ROWS: list[tuple] = [
    ("AceStepTransformer1DModel", {
        **GROUPED, "hidden_size": 2 * WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2, "head_dim": 32,
        "in_channels": 3 * WIDTH, "audio_acoustic_hidden_dim": WIDTH, "sliding_window": 4,
    }, _ace_step, ("timestep", "timestep_r")),
    ("LongCatAudioDiTTransformer", {
        "dit_dim": WIDTH, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": WIDTH, "latent_dim": WIDTH}, _longcat),
    ("MiniMaxMusic3Transformer1DModel", {
        **HEADS, "in_channels": WIDTH, "condition_dim": WIDTH, "num_layers": 2, "ff_inner_dim": 2 * WIDTH,
        "rotary_dim": 16, "fourier_embedding_dim": WIDTH,
    }, lambda draw: _latents(draw) | {"encoder_hidden_states": draw.text(tokens=LENGTH)}),
    ("StableAudioDiTModel", {
        "sample_size": LENGTH, "in_channels": WIDTH, "num_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 4, "num_key_value_attention_heads": 2, "out_channels": WIDTH,
        "cross_attention_dim": WIDTH, "time_proj_dim": WIDTH, "global_states_input_dim": 2 * WIDTH,
        "cross_attention_input_dim": WIDTH,
    }, _stable_audio),
    ("StableAudio3DiTModel", {
        "io_channels": WIDTH, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "cond_token_dim": WIDTH,
        "global_cond_dim": WIDTH, "local_add_cond_dim": WIDTH, "timestep_features_dim": WIDTH, "num_memory_tokens": 4,
    }, _stable_audio_3),
    ("T5FilmDecoder", {
        "input_dims": WIDTH, "targets_length": LENGTH, "d_model": WIDTH, "num_layers": 2, "num_heads": 2, "d_kv": 32,
        "d_ff": 2 * WIDTH,
    }, _t5_film, "decoder_noise_time"),
]  # fmt: skip
AUDIO = [Tiny(*row) for row in _ROWS]

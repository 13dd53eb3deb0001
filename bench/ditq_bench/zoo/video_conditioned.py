"""Tiny configurations of the classes that draw videos with or from more than a text: sound, frames, faces, cameras."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from diffusers.models.transformers import transformer_wan_animate_2
from diffusers.models.transformers.transformer_sana_wm_refiner import (
    SanaWMLTX2AudioVideoRotaryPosEmbed,
)
from diffusers.models.transformers.transformer_wan_animate_2 import (
    WanAnimate2KVCache,
    WanAnimate2Transformer3DModel,
    create_block_mask,
)

from ditq_bench.zoo.tiny import GROUPED, HEADS, LATENTS, ROPE, SIDE, TEXT, WIDTH, Draw, Tiny
from ditq_bench.zoo.video import (
    COGVIDEOX,
    FRAMES,
    GRID,
    HUNYUAN,
    KANDINSKY,
    KANDINSKY_TEXT,
    PATCHES,
    WAN,
    cogvideox,
    from_image,
    hunyuan,
    latents,
    ltx,
    masked,
)


def _consisid(draw: Draw) -> dict[str, Any]:
    """With a face: an identity and what five scales of a vision tower saw."""
    seen = [draw.normal(TEXT, WIDTH) for _ in range(5)]
    return {**cogvideox(draw), "id_cond": draw.normal(2 * WIDTH), "id_vit_hidden": seen}


def _framepack(draw: Draw) -> dict[str, Any]:
    """With the frames drawn so far: two whole, and older ones at a half and a quarter of the size."""
    history = {"latents_clean": 2, "latents_history_2x": 2, "latents_history_4x": 4}
    given = {name: draw.normal(LATENTS, frames, SIDE, SIDE) for name, frames in history.items()}
    first, indices = 0, {}
    for name, frames in history.items():
        indices[f"indices_{name}"] = torch.arange(first, first + frames)
        first += frames
    return {
        **hunyuan(draw),
        "image_embeds": draw.text(),
        "indices_latents": torch.arange(first, first + FRAMES),
        **given,
        **indices,
    }


def _helios(draw: Draw) -> dict[str, Any]:
    """With history: two recent frames, two of a while ago, four older."""
    history = {"short": 2, "mid": 2, "long": 4}
    given, first = {}, 0
    for name, frames in reversed(history.items()):
        given[f"latents_history_{name}"] = draw.normal(LATENTS, frames, SIDE, SIDE)
        indices = torch.arange(first, first + frames).expand(draw.batch, -1)
        given[f"indices_latents_history_{name}"] = indices
        first += frames
    indices = torch.arange(first, first + FRAMES).expand(draw.batch, -1)
    return {**latents(draw), **given, "indices_hidden_states": indices}


def _vace(draw: Draw) -> dict[str, Any]:
    control = draw.normal(LATENTS, FRAMES, SIDE, SIDE)
    return {**latents(draw), "control_hidden_states": control}


def _kandinsky6(draw: Draw) -> dict[str, Any]:
    """Channels last; the latents come with those of a given frame and a mask; a sound goes along."""
    return {
        **latents(draw),
        "hidden_states": draw.normal(FRAMES, SIDE, SIDE, 2 * LATENTS + 1),
        "pooled_projections": draw.normal(WIDTH),
        "audio_hidden_states": draw.normal(TEXT, WIDTH),
        "encoder_attention_mask": draw.mask()[:, None, None],
    }


def _hunyuan15(draw: Draw) -> dict[str, Any]:
    """The latents come with those of a given frame and a mask; a text, what it says to write, and an image."""
    return {
        **masked(draw),
        "hidden_states": draw.normal(2 * LATENTS + 1, FRAMES, SIDE, SIDE),
        "encoder_hidden_states_2": draw.text(),
        "encoder_attention_mask_2": draw.mask(),
        "image_embeds": draw.text(),
    }


def _ltx2(draw: Draw) -> dict[str, Any]:
    """With sound, which has a text of its own."""
    return {
        **ltx(draw),
        "audio_hidden_states": draw.normal(TEXT, WIDTH),
        "audio_encoder_hidden_states": draw.text(),
        "audio_encoder_attention_mask": draw.mask(),
        "audio_num_frames": TEXT,
        "fps": 24.0,
    }


def _sana_wm_refiner(draw: Draw) -> dict[str, Any]:
    """As LTX2 without its sound; the caller turns the coordinates."""
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(WIDTH, num_attention_heads=2)
    place = torch.device("cpu")
    turns = rope(rope.prepare_video_coords(draw.batch, *GRID, place), device=place)
    plain = masked(draw)
    plain["hidden_states"] = draw.normal(PATCHES, 4 * LATENTS)
    return {**plain, "video_rotary_emb": turns}


def _sana_wm(draw: Draw) -> dict[str, Any]:
    """With a camera: a pose [4, 4] and a lens (focal lengths, centre) a frame, and the rays of its six coordinates."""
    pose = torch.eye(4).flatten().expand(draw.batch, FRAMES, -1).clone()
    pose[..., 3] = torch.arange(FRAMES) * 0.1  # it moves to the side
    lens = torch.tensor([8.0, 8.0, 4.0, 4.0]).expand(draw.batch, FRAMES, -1)
    return {
        **masked(draw),
        "hidden_states": draw.normal(WIDTH, FRAMES, SIDE, SIDE),
        "timestep": draw.times(1000)[:, None, None].expand(-1, 1, FRAMES),
        "camera_conditions": torch.cat([pose, lens], dim=-1),
        "chunk_plucker": draw.normal(LATENTS, FRAMES, SIDE, SIDE),
    }


def _minimax_h3(draw: Draw) -> dict[str, Any]:
    """Text, video and sound in one sequence; each token says which of the timesteps is its own: the text's is 0."""
    sound = TEXT
    kinds = torch.tensor([0] * TEXT + [1] * PATCHES + [2] * sound)
    place = torch.arange(len(kinds))
    return {
        "hidden_states": draw.normal(PATCHES, 4 * LATENTS),
        "audio_hidden_states": draw.normal(sound, WIDTH),
        "encoder_hidden_states": draw.text(),
        "timestep": torch.tensor([0.0, 600.0, 300.0]),
        "timestep_indices": kinds,
        "token_tags": kinds,
        "position_ids": place[:, None].expand(-1, 3),
        "text_indices": place[kinds == 0],
        "video_indices": place[kinds == 1],
        "audio_indices": place[kinds == 2],
    }


def _cosmos3(draw: Draw) -> dict[str, Any]:
    """A text and all videos in one sequence without a batch; each patch that is noisy has a timestep."""
    length = TEXT + draw.batch * PATCHES
    shown = torch.arange(TEXT, length)
    frames = [torch.arange(FRAMES)] * draw.batch
    return {
        "input_ids": draw.integers(32, TEXT)[0],
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(length).expand(3, -1),
        "und_len": TEXT,
        "sequence_length": length,
        "vision_tokens": list(draw.normal(1, LATENTS, FRAMES, SIDE, SIDE)),
        "vision_token_shapes": [GRID] * draw.batch,
        "vision_sequence_indexes": shown,
        "vision_mse_loss_indexes": shown,
        "vision_timesteps": draw.times(1000).repeat_interleave(PATCHES),
        "vision_noisy_frame_indexes": frames,
    }


def _motif(draw: Draw) -> dict[str, Any]:
    """The latents come with those of a given frame and a mask."""
    shown = draw.normal(2 * LATENTS + 1, FRAMES, SIDE, SIDE)
    return {**masked(draw), "hidden_states": shown, "image_embeds": draw.text()}


def _far(draw: Draw) -> dict[str, Any]:
    """Frames before channels; three chunks of a frame, of which the first is compressed."""
    times = draw.times(1000)[:, None].expand(-1, 3)
    return {
        "hidden_states": draw.normal(3, LATENTS, SIDE, SIDE),
        "encoder_hidden_states": draw.text(),
        "timestep": times,
        "r_timestep": times / 2,
        "chunk_partition": [1, 1, 1],
    }


def _animate(draw: Draw) -> dict[str, Any]:
    """A person to move: poses, and a face of four pictures for each frame but the first."""
    return {
        **from_image(draw),
        "hidden_states": draw.normal(2 * LATENTS + 4, FRAMES + 1, SIDE, SIDE),
        "pose_hidden_states": draw.normal(LATENTS, FRAMES, SIDE, SIDE),
        "face_pixel_values": draw.normal(3, 4 * FRAMES, SIDE, SIDE),
    }


def _animate2(draw: Draw) -> dict[str, Any]:
    """A person to move, whose keys and values two blocks keep from an earlier call; lists of samples."""
    cache = WanAnimate2KVCache(2)
    for layer in range(2):
        cache.get(layer).store(draw.normal(PATCHES, 2, 32), draw.normal(PATCHES, 2, 32))
    frames = FRAMES + 1
    return {
        "hidden_states": list(draw.normal(LATENTS, frames, SIDE, SIDE)),
        "timestep": draw.times(1000),
        "encoder_hidden_states": list(draw.text()),
        "condition_latents": list(draw.normal(LATENTS + 4, frames, SIDE, SIDE)),
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": frames * PATCHES // FRAMES,
        "reference_grid_sizes": torch.tensor([GRID] * draw.batch),
        "origin_len": 4 * (FRAMES - 1),
        "origin_area": [8 * SIDE, 8 * SIDE],
    }


def _mask(model: WanAnimate2Transformer3DModel) -> None:
    """Make the mask that the model keeps: it would compile that first, which takes seconds."""

    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        return create_block_mask(*args, **{**kwargs, "_compile": False})

    size = FRAMES, PATCHES // FRAMES
    with mock.patch.object(transformer_wan_animate_2, "create_block_mask", uncompiled):
        model.block_masks[size] = model.create_mask(*size, torch.device("cpu"))


_LTX2 = {
    **HEADS, "in_channels": 4 * LATENTS, "out_channels": 4 * LATENTS, "cross_attention_dim": WIDTH,
    "audio_in_channels": WIDTH, "audio_out_channels": WIDTH, "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 32, "audio_cross_attention_dim": WIDTH, "num_layers": 2, "caption_channels": WIDTH,
}  # fmt: skip

# class, configuration, arguments of forward, timestep
_ROWS: list[tuple] = [
    ("AnyFlowFARTransformer3DModel", {**WAN, "full_chunk_limit": 2, "chunk_partition": (1, 1, 1)}, _far,
     ("timestep", "r_timestep")),
    ("ConsisIDTransformer3DModel", {
        **COGVIDEOX, "num_attention_heads": 6, "is_train_face": True, "cross_attn_interval": 1,
        "cross_attn_dim_head": 32,
        "cross_attn_num_heads": 2, "LFE_id_dim": 2 * WIDTH, "LFE_vit_dim": WIDTH, "LFE_depth": 5, "LFE_dim_head": 32,
        "LFE_num_heads": 2, "LFE_num_id_token": 2, "LFE_num_querie": 4, "LFE_output_dim": 2 * WIDTH,
    }, _consisid),
    ("Cosmos3OmniTransformer", {
        **GROUPED, "head_dim": 32, "hidden_size": 2 * WIDTH, "intermediate_size": 4 * WIDTH,
        "latent_channel": LATENTS, "patch_latent_dim": 4 * LATENTS, "num_hidden_layers": 2, "vocab_size": 32,
        "rope_axes_dim": (6, 5, 5),
    }, _cosmos3, "vision_timesteps"),
    ("HeliosTransformer3DModel", {**WAN, "rope_dim": ROPE}, _helios),
    ("HunyuanVideo15Transformer3DModel", {
        **HEADS, "in_channels": 2 * LATENTS + 1, "out_channels": LATENTS, "num_layers": 2, "text_embed_dim": WIDTH,
        "text_embed_2_dim": WIDTH, "image_embed_dim": WIDTH, "rope_axes_dim": ROPE,
    }, _hunyuan15),
    ("HunyuanVideoFramepackTransformer3DModel", {
        **HUNYUAN, "has_image_proj": True, "image_proj_dim": WIDTH, "has_clean_x_embedder": True}, _framepack),
    ("Kandinsky6Transformer3DModel", {
        **KANDINSKY, **KANDINSKY_TEXT, "in_audio_dim": WIDTH, "out_audio_dim": WIDTH}, _kandinsky6),
    ("LTX2VideoTransformer3DModel", _LTX2, _ltx2),
    ("MiniMaxH3Transformer3DModel", {
        **HEADS, "hidden_size": WIDTH, "num_layers": 2, "ffn_dim": 2 * WIDTH, "in_channels": LATENTS,
        "audio_in_channels": WIDTH, "text_dim": WIDTH, "freq_dim": WIDTH, "time_embed_hidden_dim": WIDTH,
        "time_embed_dim": WIDTH, "rope_freq_dim": 5,
    }, _minimax_h3),
    ("MotifVideoTransformer3DModel", {
        **HEADS, "in_channels": 2 * LATENTS + 1, "out_channels": LATENTS, "num_layers": 2, "num_single_layers": 4,
        "num_decoder_layers": 2, "text_embed_dim": WIDTH, "image_embed_dim": WIDTH, "rope_axes_dim": ROPE,
        "enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True,
    }, _motif),
    ("SanaWMLTX2RefinerTransformer3DModel", _LTX2, _sana_wm_refiner),
    ("SanaWMTransformer3DModel", {
        "in_channels": WIDTH, "num_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2, "softmax_every_n": 2,
        "linear_head_dim": 32, "chunk_plucker_channels": LATENTS, "chunk_plucker_post_attn_blocks": 2,
        "caption_channels": WIDTH, "mlp_ratio": 2.0,
    }, _sana_wm),
    ("WanAnimate2Transformer3DModel", {
        "text_len": TEXT, "in_dim": 2 * LATENTS + 4, "dim": WIDTH, "ffn_dim": 2 * WIDTH, "freq_dim": WIDTH,
        "text_dim": WIDTH, "out_dim": LATENTS, "num_heads": 2, "num_layers": 2, "use_img_emb": False,
    }, _animate2, "timestep", None, (), _mask),
    ("WanAnimateTransformer3DModel", {
        **WAN, "in_channels": 2 * LATENTS + 4, "latent_channels": LATENTS, "image_dim": WIDTH,
        "added_kv_proj_dim": WIDTH, "motion_encoder_channel_sizes": {"4": LATENTS, "8": LATENTS},
        "motion_encoder_size": SIDE, "motion_style_dim": WIDTH, "motion_encoder_dim": WIDTH,
        "face_encoder_hidden_dim": WIDTH, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1,
    }, _animate),
    ("WanVACETransformer3DModel", {**WAN, "vace_layers": [0, 1], "vace_in_channels": LATENTS}, _vace),
]  # fmt: skip
VIDEO_CONDITIONED = [Tiny(*row) for row in _ROWS]

"""Inputs of one small forward, made from a class's signature and configuration.

Names say what an argument is; its width is found by trying: arguments start with widths that nothing else has, and the
first linear, norm or convolution that expects another says which.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from ditq_converters.hooks import hooked
from ditq_converters.sites.trace import run_wide
from ditq_converters.sites.twin import widen

BATCH, TEXT, SIDE, FRAMES = 2, 6, 8, 2
PATCHES = (SIDE // 2) ** 2
ODD = (1009, 1013, 1019, 1021, 1031, 1033)  # widths that no layer has
TRIES = 12
CHANNELS = ("in_channels", "in_visual_dim", "in_dim")  # of a configuration
TEXT_SHAPE = (BATCH, TEXT, -1)
LATENTS = (  # what latents may look like; -1: channels
    (BATCH, -1, SIDE, SIDE),
    (BATCH, -1, FRAMES, SIDE, SIDE),
    (BATCH, PATCHES, -1),
    (BATCH, FRAMES, -1, SIDE, SIDE),
    (BATCH, FRAMES, SIDE, SIDE, -1),
    (BATCH, -1, PATCHES),
)


class NoInputs(ValueError):
    """No inputs can be made for a class."""


class Unlike(Exception):
    """A layer expects `width` where an argument of the odd width `odd` came."""

    def __init__(self, odd: int, width: int) -> None:
        """Keep both."""
        super().__init__(odd, width)
        self.odd, self.width = odd, width


@dataclass
class Draft:
    """Inputs in the making.

    Attributes:
        config: of the model.
        latents: shape of the latents, one of `LATENTS`.
        widths: argument -> width, odd until it is known.
        generator: of random numbers.
    """

    config: Any
    latents: tuple[int, ...]
    widths: dict[str, int]
    generator: torch.Generator

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        """Random numbers, -1 being the argument's width."""
        width = self.widths.setdefault(name, ODD[len(self.widths) % len(ODD)])
        shape = tuple(width if size < 0 else size for size in shape)
        return torch.randn(shape, generator=self.generator)

    def ids(self, tokens: int) -> torch.Tensor:
        """[tokens, axes] coordinates; the latents' in the last two columns."""
        axes = len(self.config.get("axes_dims_rope") or (0, 0, 0))
        ids = torch.zeros(tokens, axes)
        if tokens == PATCHES:
            ids[:, -2], ids[:, -1] = torch.arange(PATCHES) // 4, torch.arange(PATCHES) % 4
        return ids


def _latents(draft: Draft, name: str) -> torch.Tensor:
    channels = next((draft.config[key] for key in CHANNELS if draft.config.get(key)), None)
    if channels is not None:
        draft.widths.setdefault(name, channels)
    return draft.normal(name, *draft.latents)


def _mask(draft: Draft, name: str) -> torch.Tensor:
    """The last text is shorter."""
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    mask[-1, -2:] = False
    return mask


def _times(draft: Draft, name: str) -> torch.Tensor:
    return torch.linspace(0.2, 0.8, BATCH)


def _pairs(draft: Draft, name: str) -> torch.Tensor:
    return torch.full((BATCH, 2), 64.0)


def _guidance(draft: Draft, name: str) -> torch.Tensor | None:
    return _times(draft, name) if draft.config.get("guidance_embeds") else None


MAKERS: dict[str, Callable[[Draft, str], Any]] = {
    "hidden_states": _latents,
    "x": lambda draft, name: [
        draft.normal(name, draft.config.in_channels, 1, SIDE, SIDE) for _ in range(BATCH)
    ],
    "cap_feats": lambda draft, name: [draft.normal(name, TEXT, -1) for _ in range(BATCH)],
    "encoder_hidden_states": lambda draft, name: draft.normal(name, *TEXT_SHAPE),
    "encoder_hidden_states_2": lambda draft, name: draft.normal(name, *TEXT_SHAPE),
    "encoder_hidden_states_t5": lambda draft, name: draft.normal(name, *TEXT_SHAPE),
    "text_bth": lambda draft, name: draft.normal(name, *TEXT_SHAPE),
    "text_lens": lambda draft, name: torch.tensor([TEXT] * BATCH),
    "encoder_attention_mask": _mask,
    "encoder_attention_mask_2": _mask,
    "encoder_hidden_states_mask": _mask,
    "encoder_mask": _mask,
    "text_embedding_mask": _mask,
    "text_embedding_mask_t5": _mask,
    "pooled_projections": lambda draft, name: draft.normal(name, BATCH, -1),
    "pooled_embeds": lambda draft, name: draft.normal(name, BATCH, -1),
    "global_hidden_states": lambda draft, name: draft.normal(name, BATCH, -1),
    "timestep": _times,
    "timesteps": _times,
    "timestep_r": _times,
    "r_timestep": _times,
    "t": _times,
    "guidance": _guidance,
    "class_labels": lambda draft, name: torch.zeros(BATCH, dtype=torch.long),
    "img_ids": lambda draft, name: draft.ids(PATCHES),
    "txt_ids": lambda draft, name: draft.ids(TEXT),
    "img_shapes": lambda draft, name: [[(1, SIDE // 2, SIDE // 2)]] * BATCH,
    "original_size": _pairs,
    "target_size": _pairs,
    "crop_coords": _pairs,
    "num_frames": lambda draft, name: 1,
    "height": lambda draft, name: SIDE // 2,
    "width": lambda draft, name: SIDE // 2,
    "added_cond_kwargs": lambda draft, name: {"resolution": None, "aspect_ratio": None},
}


def forward_inputs(twin: Any) -> dict[str, Any]:
    """A small batch for one forward, as keyword arguments.

    Args:
        twin: a model with weights, in fp64; it is run until inputs fit.

    Raises:
        NoInputs: none were found.
    """
    known = [name for name in inspect.signature(type(twin).forward).parameters if name in MAKERS]
    plain = [name for name in known if not name.endswith("_2")]  # without a second text encoder
    for wanted, latents in product([known, plain][: 2 - (known == plain)], LATENTS):
        widths: dict[str, int] = {}
        for _ in range(TRIES):
            draft = Draft(twin.config, latents, widths, torch.Generator().manual_seed(0))
            inputs = {name: MAKERS[name](draft, name) for name in wanted}
            try:
                with _widths_checked(twin):
                    run_wide(twin, widen(inputs))
            except Unlike as unlike:
                name = next(name for name, width in widths.items() if width == unlike.odd)
                widths[name] = unlike.width
            except Exception:  # another shape of latents may do
                break
            else:
                return inputs
    raise NoInputs(
        f"{type(twin).__name__}: its sites are found on one forward, whose inputs cannot be made from its "
        "configuration; pass its keyword arguments as inputs (--inputs FILE)"
    )


def _widths_checked(model: nn.Module) -> ExitStack:
    """Inside, a layer that is given an odd width raises `Unlike`."""

    def check(module: Any, args: tuple[Any, ...]) -> None:
        expected, axis = _expected(module)
        if args and isinstance(args[0], torch.Tensor) and args[0].dim() > 1:
            width = args[0].shape[axis]
            if width in ODD and width != expected:
                raise Unlike(width, expected)

    layers = (m for m in model.modules() if _expected(m)[0])
    return hooked(layer.register_forward_pre_hook(check) for layer in layers)


def _expected(module: Any) -> tuple[int, int]:
    """Width that a layer expects, and the axis it stands at; 0: any."""
    if isinstance(module, nn.Linear):
        return module.in_features, -1
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels, 1
    weight = getattr(module, "weight", None)  # norms of torch and of diffusers
    if not list(module.children()) and isinstance(weight, torch.Tensor) and weight.dim() == 1:
        return len(weight), -1
    return 0, -1

"""What a tiny pipeline of the zoo is, and the calls that all of them answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from ditq_bench.zoo.tiny import Tiny, quiet

PROMPTS = ("a red fox", "two boats")
PIXELS = 16  # side of an image whose latents are 8 by 8


@dataclass(frozen=True)
class Pipe:
    """A pipeline of diffusers, tiny.

    `calls` are the keyword arguments of two calls: two steps, the smallest size. `transformers` names the components
    that are diffusion transformers, in the order in which a call uses them. `saved` is False where saving loses what is
    ours: the size (HiDream draws images 16 times as large then) or a component (Cosmos' guardrail).
    """

    make: Callable[[], Any]
    calls: tuple[Mapping[str, Any], ...]
    transformers: tuple[str, ...] = ("transformer",)
    saved: bool = True

    def build(self, seed: int = 0) -> Any:
        """The pipeline in eval mode, fp32, without a progress bar: equal seeds give equal bits."""
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            pipe = self.make()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def model(tiny: Tiny, seed: int = 0, **changes: Any) -> nn.Module:
    """The transformer of an entry, with some of its configuration changed."""
    return replace(tiny, config={**tiny.config, **changes}).build(seed)


def calls(**more: Any) -> tuple[dict[str, Any], ...]:
    """The keyword arguments of two calls; a value of None drops an argument."""
    plain = {
        "num_inference_steps": 2, "height": PIXELS, "width": PIXELS, "max_sequence_length": 16, **more,
    }  # fmt: skip
    kept = {name: value for name, value in plain.items() if value is not None}
    return tuple({"prompt": prompt, **kept} for prompt in PROMPTS)


def picture(side: int = PIXELS) -> Image.Image:
    """A colour gradient, for what takes an image."""
    ramp = Image.linear_gradient("L").resize((side, side))
    return Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))

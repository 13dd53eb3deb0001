"""Draw all inputs of `ditq sample`: into one grid, into latents, or a file each in a folder that processes share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from ditq_runtime.calls.inputs import Input
from ditq_runtime.calls.pipeline import Drawn, draw
from ditq_runtime.calls.sharing import same_work, take_turns
from ditq_runtime.cli.images import grid
from ditq_runtime.files import atomic_file, check_file, check_ours

PICTURE, LATENTS = ".png", ".safetensors"
WORK, LOCKS = "inputs.json", ".locks"


def check_out(out: Path) -> None:
    """ValueError unless `--out` can be written: a `.png`, a `.safetensors`, or a folder."""
    if out.suffix:
        check_file(out, (PICTURE, LATENTS))
    elif out.is_file():
        raise ValueError(f"{out}: is a file without a suffix; name a .png or a folder")
    else:
        check_ours(out, WORK)


def write_all(
    out: Path, pipe: Any, given: Sequence[Input], columns: int, work: dict[str, Any]
) -> int:
    """Draw with a `ready` pipeline.

    Args:
        out: as `check_out` allows. A folder gets a file per input; processes share the inputs, and a killed run goes
            on after the last finished one.
        pipe: the pipeline.
        given: its calls.
        columns: images per row of a grid; the frames of a video have a row of their own.
        work: what else the images in a folder depend on.

    Returns:
        How many images, or samples, this process drew.

    Raises:
        ValueError: a picture of what has no VAE or makes no images, latents that a pipeline hides or that differ in
            size, a folder that holds something else.
    """
    seen = getattr(pipe, "vae", None) is not None
    if out.suffix == PICTURE and not seen:
        raise ValueError(
            f"{out}: a transformer alone makes latents, not images; name a .safetensors"
        )
    if out.suffix:
        drawn = [draw(pipe, one, decode=out.suffix == PICTURE) for one in given]
        return _write(out, pipe, drawn, given, columns)
    out.mkdir(parents=True, exist_ok=True)
    same_work(out / WORK, {"inputs": [one.digest for one in given], **work}, "samples")
    files = [out / f"{index:04d}{PICTURE if seen else LATENTS}" for index in range(len(given))]
    counts = []

    def make(index: int) -> None:
        one = [given[index]]
        counts.append(_write(files[index], pipe, [draw(pipe, one[0], seen)], one, columns))

    take_turns(len(given), out / LOCKS, lambda index: files[index].exists(), make)
    return sum(counts)


def _write(path: Path, pipe: Any, drawn: list[Drawn], given: Sequence[Input], columns: int) -> int:
    """One file; returns how many images, or samples, are in it."""
    if path.suffix == LATENTS:
        return _write_latents(path, pipe, [one.latents for one in drawn])
    images: list[Image.Image] = []
    for one in drawn:
        if one.images is None:
            name = type(pipe).__name__
            raise ValueError(f"{name} makes no images; name a .safetensors for its latents")
        images += to_pil(one.images)
    frames = len(images) // sum(one.samples for one in given)
    with atomic_file(path) as part:
        across = frames if frames > 1 else min(columns, len(images))
        grid(images, across).save(part, format="PNG")
    return len(images)


def _write_latents(path: Path, pipe: Any, latents: list[torch.Tensor | None]) -> int:
    there = [x for x in latents if x is not None]
    if len(there) < len(latents):
        raise ValueError(f"{type(pipe).__name__} shows no latents; name a .png")
    if len({x.shape[1:] for x in there}) > 1:
        raise ValueError(f"{path}: inputs of several sizes make several files; name a folder")
    whole = torch.cat(there)
    with atomic_file(path) as part:
        save_file({"latents": whole.contiguous()}, part)
    return len(whole)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images [S, 1 or 3, H, W] in [-1, 1] -> PIL, rounded as diffusers does."""
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    arrays = pixels.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]

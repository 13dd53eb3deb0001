"""What a text-conditioned model is told: embeddings of prompts, from its pipeline's own encoders or from a file.

Names are those of the pipelines' arguments: `prompt_embeds` and, as the model needs them, `prompt_attention_mask` and
`pooled_prompt_embeds`; with `negative_` in front, those of the empty prompt, for guidance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ditq_runtime.calls.prompts import read_prompts

NEGATIVE = "negative_"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Captions:
    """Embeddings of P prompts.

    Attributes:
        tensors: name -> [P, ...] on the CPU, or [P + 1, ...] with those of the empty prompt last.
        count: P.
    """

    tensors: Tensors
    count: int

    @property
    def has_null(self) -> bool:
        """The empty prompt is there, so guidance can run."""
        return all(len(tensor) > self.count for tensor in self.tensors.values())

    @property
    def digest(self) -> str:
        """SHA-256 of the embeddings, so that a resumed run is known to have the same."""
        state = hashlib.sha256()
        for name in sorted(self.tensors):
            raw = self.tensors[name].contiguous().view(torch.uint8)
            state.update(name.encode() + raw.numpy().tobytes())
        return state.hexdigest()

    def take(self, name: str, ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Rows of one tensor; floats in the dtype of `like`, all on its device."""
        rows = self.tensors[name][ids.cpu()]
        return rows.to(like.device, like.dtype if rows.is_floating_point() else rows.dtype)


def read_captions(
    prompts: Sequence[str] | str | Path, pipe: Any, architecture: str, widths: dict[str, int]
) -> Captions:
    """Embeddings of a list of prompts, of a text file with one per line, or stored in a `.safetensors` file.

    Args:
        prompts: the prompts themselves, or a path.
        pipe: whose text encoders read prompts; a transformer alone can only take embeddings.
        architecture: class name of its transformer.
        widths: names that the model needs -> size of their last dimension, 0 for any.

    Raises:
        ValueError: a file that is empty or malformed, embeddings that do not fit the model, or no text encoders.
        OSError: it cannot be read.
    """
    if isinstance(prompts, str | Path):
        path = Path(prompts)
        if path.suffix == ".safetensors":
            return _captions(load_file(path), widths, str(path))
        prompts = read_prompts(path)
    if not prompts:
        raise ValueError("prompts must hold at least one, got none")
    return _captions(encode(pipe, prompts, architecture), widths, "the text encoders")


def encode(pipe: Any, prompts: Sequence[str], architecture: str) -> Tensors:
    """Embeddings by the pipeline's own text encoders, a prompt at a time; names as above.

    Raises:
        ValueError: no pipeline, or one without text encoders.
    """
    if not hasattr(pipe, "encode_prompt") or getattr(pipe, "text_encoder", None) is None:
        raise ValueError(
            "prompts need a pipeline with its text encoders, and this model comes without; "
            "pass a .safetensors file of precomputed embeddings instead"
        )
    with torch.no_grad():
        rows = [ENCODERS[architecture](pipe, prompt) for prompt in prompts]
    return {
        name: tensor.cpu()
        if name.startswith(NEGATIVE)
        else torch.cat([r[name].cpu() for r in rows])
        for name, tensor in rows[0].items()
    }


def _encode_pixart(pipe: Any, prompt: str) -> Tensors:
    names = ("prompt_embeds", "prompt_attention_mask")
    values = pipe.encode_prompt(prompt, True, device=pipe.device)
    return dict(zip((*names, *(f"{NEGATIVE}{name}" for name in names)), values, strict=True))


def _encode_sd3(pipe: Any, prompt: str) -> Tensors:
    names = ("prompt_embeds", "pooled_prompt_embeds")
    order = (names[0], f"{NEGATIVE}{names[0]}", names[1], f"{NEGATIVE}{names[1]}")
    values = pipe.encode_prompt(prompt, prompt, prompt, device=pipe.device)
    return dict(zip(order, values, strict=True))


def _encode_flux(pipe: Any, prompt: str) -> Tensors:
    embeds, pooled, _ = pipe.encode_prompt(prompt, device=pipe.device)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


ENCODERS: dict[str, Callable[[Any, str], Tensors]] = {
    "PixArtTransformer2DModel": _encode_pixart,
    "SD3Transformer2DModel": _encode_sd3,
    "FluxTransformer2DModel": _encode_flux,
}


def _captions(found: Tensors, widths: dict[str, int], where: str) -> Captions:
    """Check what was found and append the empty prompt's rows where they are all there."""
    missing = sorted(set(widths) - set(found))
    if missing:
        raise ValueError(
            f"{where}: {', '.join(missing)} missing; this model needs {', '.join(widths)}, and each with "
            f"{NEGATIVE} in front for guidance"
        )
    counts = {len(found[name]) for name in widths}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"{where}: its tensors have {sorted(counts)} prompts; they must agree")
    for name, width in widths.items():
        if width and found[name].shape[-1] != width:
            raise ValueError(
                f"{where}: {name} must end in {width} for this model, got {list(found[name].shape)}"
            )
    has_null = all(f"{NEGATIVE}{name}" in found for name in widths)
    tensors = {}
    for name in widths:
        tensors[name] = found[name]
        if has_null:
            null = found[f"{NEGATIVE}{name}"][:1]
            if null.shape[1:] != tensors[name].shape[1:]:
                raise ValueError(
                    f"{where}: {NEGATIVE}{name} must be [.., {list(tensors[name].shape[1:])}], "
                    f"got {list(null.shape)}; pad both to one length"
                )
            tensors[name] = torch.cat([tensors[name], null.to(tensors[name].dtype)])
    return Captions(tensors, counts.pop())

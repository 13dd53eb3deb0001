"""What a pipeline is called with: entries as they were given, or made from the short forms (prompts, classes)."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ditq_runtime.calls.input_checks import (
    SEED,
    check_complete,
    check_entries,
    check_known,
    check_positive,
    check_steps,
)
from ditq_runtime.calls.input_files import embedding_entries, read_entries
from ditq_runtime.calls.labels import check_labels, class_ids, draw, read_labels
from ditq_runtime.calls.prompts import read_prompts
from ditq_runtime.calls.saved import saved_call
from ditq_runtime.calls.seeds import splitmix64

SAMPLES, LABELS_PER_CALL = 32, 8
CLASS_STEPS, CLASS_GUIDANCE = 50, 1.5  # DiT's; text pipelines have defaults of their own
BINNED_SIZES = (32, 64, 128, 256)  # latents of the models that diffusers has aspect ratio bins for

Given = Sequence[Mapping[str, Any]] | str | Path


@dataclass(frozen=True)
class Input:
    """One call of a pipeline.

    Attributes:
        arguments: of the call, without generators.
        seeds: of its generators: one, or one per sample.
    """

    arguments: dict[str, Any]
    seeds: tuple[int, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the call depends on."""
        state = hashlib.sha256()
        update_digest(state, {"arguments": self.arguments, "seeds": self.seeds})
        return state.hexdigest()

    def steps(self, pipe: Any) -> int | None:
        """Denoising steps that it asks for, or that the pipeline makes by itself; None where that cannot be told."""
        own = inspect.signature(pipe.__call__).parameters.get("num_inference_steps")
        found: int | None = self.arguments.get("num_inference_steps", own.default if own else None)
        return found

    @property
    def samples(self) -> int:
        """How many samples it draws, as far as its arguments say."""
        if len(self.seeds) > 1:
            return len(self.seeds)
        prompt = self.arguments.get("prompt")
        embeds = self.arguments.get("prompt_embeds")
        rows = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
        each = [v for k, v in self.arguments.items() if k.startswith("num_") and "_per_prompt" in k]
        return rows * (each[0] or 1 if each else 1)


def gather(
    caller: str,
    pipe: Any,
    inputs: Given | None = None,
    *,
    prompts: Sequence[str] | str | Path | None = None,
    labels: Sequence[int] | None = None,
    samples: int | None = None,
    batch: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
) -> list[Input]:
    """The calls to make.

    Args:
        caller: whose errors these are.
        pipe: a pipeline.
        inputs: keyword arguments of each call, or a file of them (`input_files.read_entries`); what is left out, the
            folder may say (`saved`).
        prompts: short form: texts, or a file of them, or a `.safetensors` file of their embeddings; one per call.
        labels: short form: classes, `batch` per call.
        samples: of a short form: how many, drawn without replacement until all are; default: all prompts, 32 classes.
        batch: samples per call of a short form; default: 8 classes, 1 prompt.
        steps: for entries that name none; default: the pipeline's, 50 for classes.
        guidance: likewise; 1.5 for classes.
        seed: of what is drawn, and of the noise of each call.
        call: further arguments of every call.

    Raises:
        ValueError: nothing to call it with, two forms at once, an argument that the pipeline does not take, an
            unknown class, a damaged file.
        OSError: a file cannot be read.
    """
    takes = inspect.signature(pipe.__call__).parameters
    forms = _forms(caller, inputs=inputs, prompts=prompts, labels=labels)
    check_positive(caller, samples=samples, batch=batch, steps=steps)
    if inputs is not None and not isinstance(inputs, str | Path):
        check_entries(caller, inputs)
    saved = saved_call(pipe)
    known = saved.pop("prompt", None)
    if not forms and "class_labels" not in takes:
        prompts = known
    shared = saved | _shared(caller, pipe, takes, steps, guidance, dict(call or {}))
    entries, drawn = _entries(caller, pipe, takes, inputs, prompts, labels, samples, seed)
    if drawn is not None:
        size = batch or LABELS_PER_CALL
        parts = [drawn[start : start + size] for start in range(0, len(drawn), size)]
        classes = {"num_inference_steps": CLASS_STEPS, "guidance_scale": CLASS_GUIDANCE} | shared
        entries = [{**classes, "class_labels": list(part)} for part in parts]
    made, number = [], 0
    for index, entry in enumerate(entries):
        arguments = {**shared, **entry}
        count = len(arguments["class_labels"]) if drawn is not None else 1
        own = arguments.pop(SEED, None)
        drawn_seeds = tuple(splitmix64(seed, number + i) for i in range(count))
        number += count
        _check(f"{caller}: input {index}", pipe, takes, arguments)
        made.append(Input(_filled(pipe, takes, arguments), _seeds(own, drawn_seeds)))
    if not made:
        raise ValueError(f"{caller}: inputs must hold at least one call, got none")
    return made


def _forms(caller: str, **given: Any) -> list[str]:
    """The one form that is given, by its name, or none; ValueError for two at once."""
    forms = [name for name, value in given.items() if value is not None]
    if len(forms) > 1:
        raise ValueError(f"{caller}: give one of {' and '.join(forms)}, not both")
    return forms


def _check(where: str, pipe: Any, takes: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """ValueError for arguments of a call that its pipeline cannot take."""
    check_known(where, pipe, takes, arguments)
    check_complete(where, pipe, takes, arguments)
    check_steps(where, pipe, arguments)
    check_encoded(where, pipe, arguments)


def _seeds(own: Any, drawn: tuple[int, ...]) -> tuple[int, ...]:
    """An entry's own seeds, an integer or a list of them; else those that were drawn."""
    if own is None:
        return drawn
    return tuple(map(int, own)) if isinstance(own, list) else (int(own),)


def _entries(
    caller: str,
    pipe: Any,
    takes: Mapping[str, Any],
    inputs: Given | None,
    prompts: Sequence[str] | str | Path | None,
    labels: Sequence[int] | None,
    samples: int | None,
    seed: int,
) -> tuple[list[dict[str, Any]], tuple[int, ...] | None]:
    """Entries as given, or the classes that entries are to be made of."""
    name, of_classes = type(pipe).__name__, "class_labels" in takes
    if isinstance(inputs, str | Path) and Path(inputs).suffix not in (".json", ".jsonl"):
        inputs, labels, prompts = (
            (None, read_labels(inputs, pipe), None) if of_classes else (None, None, inputs)
        )
    if inputs is not None:
        return (
            [dict(e) for e in inputs]
            if not isinstance(inputs, str | Path)
            else read_entries(Path(inputs))
        ), None
    if of_classes:
        if prompts is not None:
            raise ValueError(f"{caller}: {name} draws classes, not text; pass labels, not prompts")
        ids = class_ids(pipe)
        chosen = (
            draw(ids, SAMPLES if samples is None else samples, seed) if labels is None else labels
        )
        return [], check_labels(chosen, ids, caller)
    if labels is not None:
        raise ValueError(f"{caller}: labels are classes, and {name} has none")
    if prompts is None:
        raise ValueError(f"{caller}: {name} needs inputs: prompts, or the arguments of its calls")
    if isinstance(prompts, str | Path) and Path(prompts).suffix == ".safetensors":
        found = embedding_entries(Path(prompts), takes)
    else:
        texts = read_prompts(Path(prompts)) if isinstance(prompts, str | Path) else prompts
        found = [{"prompt": text} for text in texts]
    if not found:
        raise ValueError(f"{caller}: prompts must hold at least one, got none")
    chosen = range(len(found)) if samples is None else draw(range(len(found)), samples, seed)
    return [found[i] for i in chosen], None


def _shared(
    caller: str,
    pipe: Any,
    takes: Mapping[str, Any],
    steps: int | None,
    guidance: float | None,
    call: dict[str, Any],
) -> dict[str, Any]:
    asked = {"num_inference_steps": steps, "guidance_scale": guidance}
    call |= {name: value for name, value in asked.items() if value is not None}
    check_known(caller, pipe, takes, call)
    return call


def _filled(pipe: Any, takes: Mapping[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline itself needs to hear where embeddings stand for text, or a size has no bin."""
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    size = getattr(config, "sample_size", None)
    if "use_resolution_binning" in takes and size not in BINNED_SIZES:
        arguments.setdefault("use_resolution_binning", False)
    if "negative_prompt_embeds" in arguments and "negative_prompt" in takes:
        arguments.setdefault("negative_prompt", None)  # some have "" for a default
    return alike(arguments)


def alike(arguments: dict[str, Any]) -> dict[str, Any]:
    """As many negative prompts as prompts, where one text stands for all: not every pipeline repeats it."""
    prompts = arguments.get("prompt")
    return {
        name: [value] * len(prompts)
        if name.startswith("negative_prompt")
        and isinstance(value, str)
        and isinstance(prompts, list)
        else value
        for name, value in arguments.items()
    }


def check_encoded(where: str, pipe: Any, arguments: Mapping[str, Any]) -> None:
    """ValueError for text where nothing is there to encode it."""
    encoders = [
        c for n, c in getattr(pipe, "components", {}).items() if n.startswith("text_encoder")
    ]
    texts = arguments.get("prompt") is not None
    if texts and encoders and all(encoder is None for encoder in encoders):
        raise ValueError(
            f"{where}: {type(pipe).__name__} has no text encoder here, as a transformer alone or within a memory "
            "budget; give embeddings (prompt_embeds, ...) in place of text"
        )


def update_digest(state: Any, value: Any) -> None:
    """Feed a value with its kind and length, so that no two values read alike."""
    if isinstance(value, Mapping):
        state.update(f"map {len(value)}|".encode())
        for key in sorted(value, key=str):
            update_digest(state, str(key))
            update_digest(state, value[key])
    elif isinstance(value, list | tuple):
        state.update(f"list {len(value)}|".encode())
        for item in value:
            update_digest(state, item)
    elif isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        state.update(f"tensor {plain.dtype} {tuple(plain.shape)}|".encode())
        state.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        state.update(f"array {value.dtype} {value.shape}|".encode() + value.tobytes())
    elif isinstance(value, Image.Image):
        state.update(f"image {value.mode} {value.size}|".encode() + value.tobytes())
    elif callable(value):
        state.update(f"callable {getattr(value, '__qualname__', type(value).__name__)}|".encode())
    else:
        state.update(f"{type(value).__name__} {value!r}|".encode())

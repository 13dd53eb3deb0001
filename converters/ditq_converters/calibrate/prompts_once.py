"""Encode the prompts of all inputs first, then let the text encoders go: what they gave is remembered.

Works on every pipeline with `encode_prompt`: a call is begun and ended at the first call of a transformer, and what
`encode_prompt` returned is kept under the arguments it was given. The same call later gets it back.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.transformer_calls import map_tensors
from ditq_converters.hooks import until_reached
from ditq_converters.sites.trace import tensors_in
from ditq_runtime.calls.inputs import Input, update_digest
from ditq_runtime.calls.parts import transformers_in
from ditq_runtime.calls.pipeline import draw

ENCODERS = "text_encoder"


@contextmanager
def encoded_once(pipe: Any, inputs: Iterable[Input]) -> Iterator[None]:
    """Inside the block a `ready` pipeline has no text encoders and knows the prompts of these inputs.

    They are gone for good: the pipeline is one that nobody needs afterwards. One without `encode_prompt`, or without
    text encoders, stays as it is.
    """
    names = [
        n for n, c in pipe.components.items() if n.startswith(ENCODERS) and isinstance(c, nn.Module)
    ]
    if not names or not hasattr(pipe, "encode_prompt"):
        yield
        return
    memory = _Memory(pipe)
    pipe.encode_prompt = memory
    try:
        for given in inputs:
            with until_reached(transformers_in(pipe).values(), lambda *call: None):
                draw(pipe, given)
        memory.complete = True
        for name in names:
            setattr(pipe, name, None)
        gc.collect()
        yield
    finally:
        del pipe.encode_prompt


class _Memory:
    """Stands for `encode_prompt`."""

    def __init__(self, pipe: Any) -> None:
        self._encode = pipe.encode_prompt
        self._known: dict[str, tuple[Any, Any]] = {}
        self.complete = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = hashlib.sha256()
        told = [args, {k: v for k, v in kwargs.items() if k != "device"}]
        update_digest(state, told)
        key = state.hexdigest()
        if key not in self._known:
            with torch.no_grad():
                found = self._encode(*args, **kwargs)
            place = next((t.device for t in tensors_in(found)), None)
            self._known[key] = map_tensors(lambda t: t.cpu(), found), place
        kept, place = self._known[key]
        return map_tensors(lambda t: t.to(place), kept)

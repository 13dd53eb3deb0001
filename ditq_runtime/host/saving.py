"""`save_pretrained` of a packed model stores the digests of what it writes; so does `push_to_hub`, which calls it."""

from __future__ import annotations

import json
from functools import partial, wraps
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from ditq_runtime.format.digests import CONFIG, config_digest, digests_of
from ditq_runtime.host.check import check_values


def save_with_digests(model: Any) -> None:
    """Make one packed model save so."""
    model.save_pretrained = partial(
        _save_pretrained, model
    )  # a bound method would not survive pickle


def note_digests(model: Any, digests: dict[str, str]) -> None:
    """Let the config of a model that is about to be written hold the digests of its tensors, and its own."""
    config = model.config.quantization_config
    if digests:
        written = json.loads(model.to_json_string())
        config.digests = {**digests, CONFIG: config_digest(written)}


@wraps(ModelMixin.save_pretrained, assigned=("__doc__",))  # pickle goes by its own name
def _save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As diffusers does, which writes config.json first; nothing that would not load."""
    if not any(tensor.is_meta for tensor in self.state_dict().values()):
        check_values(self)
    stored, _ = self.hf_quantizer.get_state_dict_and_metadata(
        self.state_dict(), safe_serialization=kwargs.get("safe_serialization", True)
    )
    config = self.config.quantization_config
    note_digests(self, digests_of(stored))
    try:
        return type(self).save_pretrained(self, *args, **kwargs)
    finally:
        config.digests = {}  # they are the file's: what is in memory may change

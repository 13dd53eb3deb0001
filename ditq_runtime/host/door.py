"""The door of every packed model: its folder is looked at when diffusers reads its config.json, before it builds any.

diffusers makes the model of a config.json first, then asks a quantizer; a damaged number of layers would be built until
memory ends, and a `quantization_config` that is no object would end in an AttributeError.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin

from ditq_runtime.errors import CheckpointError

READER = "_dict_from_json_file"  # of ConfigMixin: everything of diffusers reads its configs by it


def watch_configs() -> None:
    """Look at each config that diffusers reads; called once, by importing `ditq_runtime`."""
    stock = vars(ConfigMixin)[READER].__func__

    def read(cls: Any, json_file: Any) -> Any:
        try:
            config = stock(cls, json_file)
        except RecursionError as error:
            raise CheckpointError(f"{json_file}: nested without end; copy it again") from error
        objects = isinstance(config, dict) and any(isinstance(v, dict) for v in config.values())
        if objects or (isinstance(config, dict) and config.get("quantization_config") is not None):
            _look_around(Path(json_file), config)
        if isinstance(config, dict) and "_class_name" in config:
            _look_for_codes(Path(json_file), config)
        return config

    setattr(ConfigMixin, READER, classmethod(read))


def _look_around(path: Path, config: dict[str, Any]) -> None:
    """What stands in a config, and the headers of the weights beside it; those of a hub may not have come yet."""
    from ditq_runtime.format.folder import WEIGHTS, TransformerFolder, check_shards, is_packed
    from ditq_runtime.format.safetensors_header import read_header  # not above: this file is light

    if not is_packed(path, config):
        return
    files = sorted(path.parent.glob(WEIGHTS))
    TransformerFolder(path.parent, config, files, {}).check_config()
    if files:
        check_shards(path.parent, files)
    stored = sum(len(read_header(file)) for file in files)
    if files:
        _check_layers(path, config, stored)


def _check_layers(path: Path, config: dict[str, Any], stored: int) -> None:
    """Counts of layers before any is built, for configs without a digest: each layer stores a tensor at least."""
    for key, value in config.items():
        counts = re.fullmatch(r"num_(\w+_)?layers", key) is not None
        if counts and (isinstance(value, str) or (isinstance(value, int) and value > stored)):
            raise CheckpointError(
                f"{path}: {key} is {str(value)[:40]!r}, but the files beside it hold {stored} tensors; copy it again"
            )


def _look_for_codes(path: Path, config: dict[str, Any]) -> None:
    """Codes beside a config that lost its quantization; what else may be wrong with a float model is not ours."""
    if config.get("quantization_config") is None and any(path.parent.glob("*.safetensors")):
        from ditq_runtime.format.folder import refuse_codes_beside  # not above: this file is light

        refuse_codes_beside(path, config)

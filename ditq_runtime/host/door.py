"""The door of every packed model: its folder is looked at when diffusers reads its config.json, before it builds any.

diffusers makes the model of a config.json first, then asks a quantizer; a damaged number of layers would be built until
memory ends, and a `quantization_config` that is no object would end in an AttributeError.
"""

from __future__ import annotations

import re
import threading
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin

from ditq_runtime.errors import CheckpointError

READER = "_dict_from_json_file"  # of ConfigMixin: everything of diffusers reads its configs by it
BUILDER = (
    "from_config"  # of ConfigMixin: then it makes the model, when all files of a hub have come
)


class _Early(threading.local):
    """The last config that was read here before its weights were there, as on the first load from a hub."""

    config: tuple[Path, dict[str, Any]] | None = None


_EARLY = _Early()


def watch_configs() -> None:
    """Look at each config that diffusers reads; called once, by importing `ditq_runtime`."""
    stock = vars(ConfigMixin)[READER].__func__

    def read(cls: Any, json_file: Any) -> Any:
        try:
            config = stock(cls, json_file)
        except RecursionError as error:
            raise CheckpointError(f"{json_file}: nested without end; copy it again") from error
        if isinstance(config, dict):
            _look(Path(json_file), config)
            early = not any(Path(json_file).parent.glob("*.safetensors"))
            _EARLY.config = (Path(json_file), config) if early else None
        return config

    setattr(ConfigMixin, READER, classmethod(read))
    build = vars(ConfigMixin)[BUILDER].__func__

    @wraps(build)
    def look_again(cls: Any, *arguments: Any, **options: Any) -> Any:
        early, _EARLY.config = _EARLY.config, None
        if early is not None:
            _look(*early)
        return build(cls, *arguments, **options)

    setattr(ConfigMixin, BUILDER, classmethod(look_again))


def _look(path: Path, config: dict[str, Any]) -> None:
    objects = any(isinstance(value, dict) for value in config.values())
    if objects or config.get("quantization_config") is not None:
        _look_around(path, config)
    if "_class_name" in config:
        _look_for_codes(path, config)


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

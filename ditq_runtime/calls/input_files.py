"""Files of inputs: JSON lines with paths of images, JSON, or embeddings in a `.safetensors` file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

PICTURES = ("image", "mask", "video", "frame")  # an argument whose name holds one takes pictures
NEGATIVE = "negative_"


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Calls of a pipeline: one JSON object per line, or a JSON list of objects.

    A text in an argument for pictures (`image`, `control_image`, `mask_image`, `video`, ...) is the path of one,
    beside the file; a list of texts there is several.

    Raises:
        ValueError: not such a file, no entry in it, a picture that is none; with the number of the entry.
        OSError: it, or a picture, cannot be read.
    """
    how = 'write one JSON object per line, such as {"prompt": "a fox", "height": 512}'
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            entries = json.loads(text)
        else:
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); {how}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: holds something else than objects; {how}")
    if not entries:
        raise ValueError(f"{path}: holds no entry; {how}")
    return [
        {key: _loaded(path, number, key, value) for key, value in entry.items()}
        for number, entry in enumerate(entries, 1)
    ]


def _loaded(path: Path, number: int, key: str, value: Any) -> Any:
    if not any(part in key for part in PICTURES):
        return value
    if isinstance(value, list):
        return [_loaded(path, number, key, item) for item in value]
    if not isinstance(value, str):
        return value
    try:
        with Image.open(path.parent / value) as picture:
            return picture.convert("RGB" if picture.mode in ("P", "RGBA", "CMYK") else picture.mode)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path}, entry {number}: {key} {value!r} is no picture") from error


def embedding_entries(path: Path, takes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One call per prompt of a file of embeddings, named as the pipeline's arguments (`prompt_embeds`, ...).

    Tensors are [P, ...]; those of the empty prompt, `negative_...`, may be [1, ...] and then serve all. Negative ones
    that the pipeline does not take are left out.

    Raises:
        ValueError: a damaged file, or tensors that disagree about P.
    """
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is no safetensors file ({error}); save it again") from error
    found = {k: t for k, t in found.items() if k in takes or not k.startswith(NEGATIVE)}
    positive = {len(tensor) for name, tensor in found.items() if not name.startswith(NEGATIVE)}
    if len(positive) != 1 or 0 in positive:
        raise ValueError(
            f"{path}: its tensors have {sorted(positive)} prompts; they must agree, and be one or more"
        )
    count = positive.pop()
    for name, tensor in found.items():
        if len(tensor) not in (1, count):
            raise ValueError(f"{path}: {name} must be [{count}, ...], got {list(tensor.shape)}")
    return [
        {name: tensor[i : i + 1] if len(tensor) == count else tensor for name, tensor in found.items()}
        for i in range(count)
    ]  # fmt: skip

"""Read a low-rank adapter: PEFT's and diffusers' layouts, from safetensors or a state dict. Never pickle.

Hu et al., arXiv:2106.09685: y = W x + (alpha / r) B A x.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ditq_runtime.format.folder import read_json
from ditq_runtime.format.rules import shown
from ditq_runtime.format.safetensors_header import read_header

FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
PREFIXES = ("base_model.model.", "transformer.")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
METADATA = "lora_adapter_metadata"
INITS = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
)  # those that leave the base model as it is
NOT_PLAIN = {  # options of PEFT that change what an adapter computes, or beside what
    "use_dora": "a DoRA, which rescales the float weights",
    "use_qalora": "a QA-LoRA, which averages its input over groups",
    "use_bdlora": "a BD-LoRA, whose factors are block-diagonal",
    "alora_invocation_tokens": "an aLoRA, which acts on some tokens only",
    "arrow_config": "an Arrow router, which chooses among adapters by token",
    "kasa_config": "a KaSA, which changes the float weights",
}
# the layer, then which tensor; an adapter's name may stand between lora_A and weight
KEY = re.compile(
    r"(?P<layer>.+)\.(?P<kind>lora_A|lora_B|lora_down|lora_up)(\.[^.]+)?\.(?P<field>weight|bias)"
)
ALPHA = re.compile(r"(?P<layer>.+)\.alpha")


@dataclass(frozen=True)
class Adapter:
    """The low-rank update of one linear: strength * (up @ down @ x + bias).

    Attributes:
        down: [r, K] fp64, LoRA's A.
        up: [N, r] fp64, LoRA's B.
        bias: [N] fp64, the bias of B; None as a rule.
        strength: alpha / r, or alpha / sqrt(r) for rank-stabilised adapters.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    strength: float


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds.

    Attributes:
        adapters: of the transformer, by the name of their linear.
        text: name of a text encoder -> its tensors, under their names in the file.
        stored: the metadata that came with it, as stored.
    """

    adapters: dict[str, Adapter]
    text: dict[str, dict[str, torch.Tensor]]
    stored: dict[str, Any]

    def config_of(self, part: str) -> dict[str, Any] | None:
        """The metadata of one text encoder, in diffusers' layout; None: there is none."""
        found = {key: value for key, value in self.stored.items() if key.startswith(f"{part}.")}
        return found or None


def read_adapters(
    source: str | Path | Mapping[str, torch.Tensor], stored: dict[str, Any] | None = None
) -> LoraFile:
    """The adapters of a transformer, by the name of their linear, and what the file holds for text encoders.

    Args:
        source: a `.safetensors` file, a folder written by PEFT or diffusers, or a state dict.
        stored: metadata of a state dict, as PEFT and diffusers write it.

    Raises:
        ValueError: no such file, a pickle, a tensor that is no part of a LoRA, an incomplete or misshapen pair, nothing
            for the transformer.
    """
    state, stored = (source, stored or {}) if isinstance(source, Mapping) else _read(source)
    config = {key.removeprefix("transformer."): value for key, value in stored.items()}
    _check_plain(config)
    text = {part: _begin(state, f"{part}.") for part in TEXT_ENCODERS}
    text = {part: tensors for part, tensors in text.items() if tensors}
    rest = {k: t for k, t in state.items() if not k.startswith(tuple(f"{p}." for p in text))}
    if text and not rest:
        raise ValueError(
            f"load_lora: it holds tensors of {', '.join(text)} only, none of the transformer; "
            "take load_lora_weights of diffusers"
        )
    return LoraFile(_adapters(rest, config), text, dict(stored))


def _check_plain(config: dict[str, Any]) -> None:
    """ValueError for what its metadata says is no product beside the unchanged weights."""
    for option, meaning in NOT_PLAIN.items():
        if config.get(option):
            raise ValueError(f"load_lora: this is {meaning}; only plain LoRA is read")
    init = config.get("init_lora_weights")
    if init not in INITS:
        raise ValueError(
            f"load_lora: trained with init_lora_weights={shown(init)}, which changed the float weights beside it; "
            "convert it with path_initial_model_for_weight_conversion of PEFT's save_pretrained"
        )


def _begin(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if key.startswith(prefix)}


def _adapters(state: Mapping[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Adapter]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        name = _strip(key)
        match, alpha = KEY.fullmatch(name), ALPHA.fullmatch(name)
        if match is None and alpha is None:
            raise ValueError(
                f"load_lora: {key} is no part of a plain LoRA of the transformer (expected LAYER.lora_A.weight and "
                "LAYER.lora_B.weight); DoRA, LoHa, LoKr and other trainers' layouts are not read: convert them first, "
                "for example with the pipeline class's lora_state_dict"
            )
        if alpha is not None:
            parts.setdefault(alpha["layer"], {})["alpha"] = tensor
        elif match is not None:
            kind = "down" if match["kind"] in ("lora_A", "lora_down") else "up"
            field = kind if match["field"] == "weight" else f"{kind}_bias"
            parts.setdefault(match["layer"], {})[field] = tensor
    if not parts:
        raise ValueError("load_lora: there is no tensor in it")
    return {layer: _adapter(layer, found, config) for layer, found in parts.items()}


def _adapter(layer: str, found: dict[str, torch.Tensor], config: dict[str, Any]) -> Adapter:
    missing = [field for field in ("down", "up") if field not in found]
    if missing or "down_bias" in found:
        raise ValueError(
            f"load_lora: {layer} needs one lora_A.weight and one lora_B.weight, got {', '.join(sorted(found))}"
        )
    down, up = found["down"].double(), found["up"].double()
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        raise ValueError(
            f"load_lora: {layer} needs lora_A [r, K] and lora_B [N, r], got {list(down.shape)} and {list(up.shape)}"
        )
    bias = found["up_bias"].double() if "up_bias" in found else None
    for tensor in (down, up, bias):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"load_lora: {layer} holds a value that is not finite")
    rank = down.shape[0]
    if not rank:
        raise ValueError(f"load_lora: {layer} has rank 0")
    alpha = _number(layer, found["alpha"]) if "alpha" in found else _alpha(layer, rank, config)
    return Adapter(down, up, bias, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _number(layer: str, value: Any) -> float:
    """A finite alpha, of a tensor with one element or of metadata."""
    single = value.numel() == 1 if isinstance(value, torch.Tensor) else type(value) in (int, float)
    number = float(value) if single else math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"load_lora: alpha of {layer} must be one finite number, got {shown(value)}"
        )
    return number


def _alpha(layer: str, rank: int, config: dict[str, Any]) -> float:
    """As PEFT finds it: a pattern that matches the end of the layer's name, else the common value, else r."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"load_lora: alpha_pattern must be an object, got {shown(patterns)}")
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", layer)
        except re.error as error:
            raise ValueError(
                f"load_lora: alpha_pattern: {shown(pattern)} is no pattern: {error}"
            ) from error
        if found:
            return _number(layer, value)
    common = config.get("lora_alpha")
    return _number(layer, rank if common is None else common)


def _read(source: str | Path) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).exists()]
        if not found:
            raise ValueError(f"load_lora: {path} holds neither {' nor '.join(FILES)}")
        path = found[0]
    if path.suffix != ".safetensors" or not path.exists():
        raise ValueError(
            f"load_lora: {path} is not a safetensors file; give one, a folder that holds one, or a state dict "
            "(a hub id must be downloaded first, a pickle is not read)"
        )
    names = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in names}
            text = (file.metadata() or {}).get(METADATA, "{}")
    except SafetensorError as error:  # of its metadata
        raise ValueError(
            f"load_lora: {path}: its header is damaged ({error}); copy it again"
        ) from error
    stored = _object(text, f"{path}: {METADATA}")
    beside = path.parent / "adapter_config.json"
    if beside.exists():
        stored |= read_json(beside)
    return state, stored


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_lora: {where} is no JSON ({error}); copy the file again") from error
    if not isinstance(found, dict):
        raise ValueError(f"load_lora: {where} is no object, got {shown(found)}")
    return found


def without_peft(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a model with adapters of PEFT, as it is without them.

    Raises:
        ValueError: PEFT trains whole copies of modules in it, which are no adapter to leave out.
    """
    inside = ".base_layer."
    copied = [key for key in state if ".modules_to_save." in key]
    if copied:
        raise ValueError(
            f"save_pretrained: PEFT holds a trained copy of {copied[0].partition('.modules_to_save.')[0]}; save the "
            "adapter with save_lora_adapter, and unload it first"
        )
    wrapped = tuple({f"{key.partition(inside)[0]}." for key in state if inside in key})
    return {
        key.replace(inside, "."): tensor
        for key, tensor in state.items()
        if inside in key or not key.startswith(wrapped)
    }


def _strip(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key

"""ditq as a quantization backend of diffusers: `from_pretrained` and `save_pretrained` of packed checkpoints.

diffusers has no entry point for third-party quantizers; `register()` adds two entries to its tables, which is what
other backends did before they were merged upstream.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ditq_runtime import checkpoint, skeleton
from ditq_runtime.errors import CheckpointError
from ditq_runtime.families import family_of
from ditq_runtime.scheme import Scheme


class DitqMethod(str, Enum):
    """The one quantization method; diffusers reads its `.value` and uses it as a dictionary key."""

    DITQ = "ditq"

    def __str__(self) -> str:
        """As written in config.json."""
        return self.value


class DitqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed transformer.

    Args:
        scheme: what the checkpoint is (`ditq_runtime.scheme.Scheme` or its dictionary).
        recipe: how it was made; never read by the runtime.
        format_version: of the checkpoint.

    Raises:
        CheckpointError: another format version, a malformed scheme or an unknown key.
    """

    def __init__(
        self,
        scheme: Scheme | dict[str, Any],
        recipe: dict[str, Any] | None = None,
        format_version: int = checkpoint.FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        """Validate and keep; diffusers calls this with the stored dictionary's entries."""
        unknown.pop("quant_method", None)
        checkpoint.check_version(format_version)
        if unknown:
            raise CheckpointError(f"quantization_config: unknown keys {sorted(unknown)}")
        self.quant_method = DitqMethod.DITQ
        self.format_version = format_version
        self.scheme = scheme if isinstance(scheme, Scheme) else Scheme.from_dict(scheme)
        self.recipe = recipe or {}

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> DitqConfig | tuple[DitqConfig, dict[str, Any]]:
        """Read `config.json`; a missing scheme or version is refused by name."""
        for key in ("format_version", "scheme"):
            if key not in config_dict:
                raise CheckpointError(
                    f"quantization_config: {key} is missing; the config.json is damaged"
                )
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, as stored."""
        return {
            "quant_method": self.quant_method.value,
            "format_version": self.format_version,
            "scheme": self.scheme.to_dict(),
            "recipe": self.recipe,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What `repr(config)` prints; diffusers calls it without defining it."""
        return self.to_dict()


class DitqQuantizer(DiffusersQuantizer):
    """Loads and saves packed checkpoints; the hooks are called by diffusers in the order they stand here."""

    use_keep_in_fp32_modules = True
    requires_calibration = True
    is_serializable = True
    is_trainable = False
    is_compileable = True

    quantization_config: DitqConfig

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> None:
        """Keep the dtype for ourselves: told of one, diffusers would cast our fp32 scales before we see them."""
        self.compute_dtype = torch_dtype or torch.float32

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Check the files themselves, before a weight is read."""
        self.headers = checkpoint.read_headers(checkpoint_files)
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: list[str] | None = None, **_: Any
    ) -> None:
        scheme = self.quantization_config.scheme
        _cast_skeleton(model, self.compute_dtype, keep_in_fp32_modules or [])
        skeleton.install(model, scheme, self.compute_dtype)
        self.absent = skeleton.duplicate_embedders(model, scheme)
        checkpoint.check_tensors(self.headers, model, self.absent)
        _name_blocks(model)
        model.config.quantization_config = self.quantization_config

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Copies of a shared embedder are absent on purpose."""
        return [key for key in missing_keys if not self._is_absent(key)]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        places = getattr(model, "hf_device_map", None)
        if places is None or len(set(map(str, places.values()))) == 1:
            left = [n for n, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
            if left:
                raise CheckpointError(f"{left[0]}: was not loaded; the checkpoint is incomplete")
            checkpoint.check_values(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `save_pretrained` writes: the shared embedder once.

        No metadata of ours: safetensors stores several entries in random order, and equal checkpoints should be
        equal files.
        """
        if not safe_serialization:
            raise ValueError(
                "a ditq checkpoint is saved as safetensors only; drop safe_serialization=False"
            )
        return {key: value for key, value in state_dict.items() if not self._is_absent(key)}, {}

    def _is_absent(self, key: str) -> bool:
        return key.startswith(tuple(f"{prefix}." for prefix in self.absent))


def adopt(model: Any, config: DitqConfig, compute_dtype: torch.dtype) -> None:
    """Mark an in-memory packed model as quantized, so that `save_pretrained` and the rest of diffusers know it."""
    quantizer = DitqQuantizer(config, pre_quantized=True)
    quantizer.update_torch_dtype(compute_dtype)
    quantizer.absent = skeleton.duplicate_embedders(model, config.scheme)
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    _name_blocks(model)


def _cast_skeleton(model: nn.Module, dtype: torch.dtype, keep_fp32: list[str]) -> None:
    """Give the float tensors of the skeleton the dtype the loader will cast to."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            kept = any(part in name.split(".") for part in keep_fp32)
            tensor.data = tensor.data.to(torch.float32 if kept else dtype)


def _name_blocks(model: Any) -> None:
    """DiT does not say which blocks repeat; device_map="auto" and regional compilation need to know."""
    family = family_of(type(model).__name__)
    names = sorted(
        {type(model.get_submodule(block)).__name__ for block in family.block_names(model)}
    )
    for attribute in ("_no_split_modules", "_repeated_blocks"):
        if not getattr(model, attribute, None):
            setattr(model, attribute, names)


def register() -> None:
    """Make `quant_method: "ditq"` known to diffusers; safe to call again."""
    auto.AUTO_QUANTIZER_MAPPING["ditq"] = DitqQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["ditq"] = DitqConfig

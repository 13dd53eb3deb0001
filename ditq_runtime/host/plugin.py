"""ditq as a quantization backend of diffusers: `from_pretrained` and `save_pretrained` of packed checkpoints.

diffusers has no entry point for third-party quantizers; `register()` adds two entries to its tables, which is what
other backends did before they were merged upstream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from ditq_runtime.errors import CheckpointError
from ditq_runtime.families import family_of
from ditq_runtime.families.fusible import examine, fusible_blocks
from ditq_runtime.format import checkpoint
from ditq_runtime.format.digests import wanted
from ditq_runtime.format.version1 import Renaming, Version1
from ditq_runtime.host import check, skeleton
from ditq_runtime.host.config import DitqConfig
from ditq_runtime.host.float_twin import float_twin
from ditq_runtime.host.guards import refuse_methods
from ditq_runtime.host.on_the_fly import (
    PackedView,
    choose_formats,
    made_names,
    pack_in_place,
    rename_tables,
    scale_rows,
)
from ditq_runtime.host.saving import save_with_digests
from ditq_runtime.host.translate import translate
from ditq_runtime.host.verify import Comparison
from ditq_runtime.layers.arranged import arrange_weights
from ditq_runtime.lora.branch import ADAPTERS
from ditq_runtime.lora.file import without_peft

COMPUTE_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)


class DitqQuantizer(DiffusersQuantizer):
    """Loads and saves packed checkpoints; the hooks are called by diffusers in the order they stand here."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False
    is_compileable = True

    quantization_config: DitqConfig

    def __init__(self, quantization_config: DitqConfig, **kwargs: Any) -> None:
        """Refuse a float checkpoint with a packed one's config."""
        super().__init__(quantization_config, **kwargs)
        if quantization_config.choice is not None:
            self.pre_quantized = False  # from_single_file does not say so
        self.loaded_keys: list[str] = []
        self.absent: list[str] = []
        digests = quantization_config.digests if wanted() else {}
        self.comparison = Comparison(digests) if digests else None
        self.renaming: Renaming | None = None
        if not self.pre_quantized and quantization_config.choice is None:
            raise ValueError(
                "quantization_config: holds the scheme of a packed checkpoint, but this checkpoint is float; "
                "pass DitqConfig(weights='w8') to quantize it as it loads, or make one with `ditq convert`"
            )

    @property
    def supports_parallel_loading(self) -> bool:
        """Quantizing in several threads would hold several layers at a time."""
        return self.pre_quantized

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> None:
        """Keep the dtype for ourselves: told of one, diffusers would cast our fp32 scales before we see them."""
        if torch_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"torch_dtype: a packed transformer computes in float32, float16 or bfloat16, got {torch_dtype}"
            )
        self.compute_dtype = torch_dtype or torch.float32

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Check the files themselves, before a weight is read."""
        if self.pre_quantized:
            self.headers = checkpoint.read_headers(checkpoint_files)
        self.loaded_keys = list(loaded_keys)
        return self.loaded_keys

    def maybe_update_state_dict(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Every shard passes here: a float one is quantized, layer by layer, while it is read."""
        if self.pre_quantized and not hasattr(self, "headers"):
            raise ValueError(
                "from_single_file: a packed checkpoint is a folder; load it with from_pretrained"
            )
        if self.pre_quantized and self.comparison is not None:
            self.comparison.add(state_dict, self.headers)
        if self.renaming is not None:
            return self.renaming.tensors(state_dict)
        if self.pre_quantized or self.quantization_config.is_open:
            return state_dict  # of a single file it is told before there is a model
        return PackedView(state_dict, self.quantization_config.scheme, self.direct)

    def _process_model_before_weight_loading(
        self,
        model: Any,
        keep_in_fp32_modules: list[str] | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        **_: Any,
    ) -> None:
        if not self.pre_quantized:
            assert self.quantization_config.choice is not None
            choice = self.quantization_config.choice
            self.direct = scale_rows(model)
            rename_tables(self.loaded_keys, self.direct)
            recipe = {"method": "linear", "on_the_fly": True, **asdict(choice)}
            self.quantization_config = DitqConfig(choose_formats(model, choice), recipe)
        skeleton.check_architecture(model, self.quantization_config.scheme)
        if self.quantization_config.version1 is not None:
            self._translate(model, self.quantization_config.version1)
        scheme = self.quantization_config.scheme
        _cast_skeleton(model, self.compute_dtype, keep_in_fp32_modules or [])
        skeleton.install(model, scheme, self.compute_dtype)
        if self.pre_quantized:
            self.absent = skeleton.duplicate_embedders(model, scheme)
            check.check_tensors(self.headers, model, self.absent)
        self.quantization_config.digests = {}
        _name_blocks(model)
        refuse_methods(model)
        save_with_digests(model)
        model.register_to_config(quantization_config=self.quantization_config)
        if state_dict is not None:
            pack_in_place(state_dict, scheme, self.direct)

    def _translate(self, model: nn.Module, old: Version1) -> None:
        """A checkpoint of version 1 becomes one of this version while it is read."""
        scheme, self.headers, self.renaming = translate(model, old, self.headers)
        self.loaded_keys[:] = dict.fromkeys(map(self.renaming.name, self.loaded_keys))
        self.quantization_config = DitqConfig(scheme, self.quantization_config.recipe)

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Copies of a shared embedder are absent on purpose, and what is quantized here was never in a file."""
        made = set() if self.pre_quantized else set(made_names(self.quantization_config.scheme))
        return [key for key in missing_keys if not self._is_absent(key) and key not in made]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        comparison, self.comparison = self.comparison, None
        if comparison is not None:
            comparison.wait()
        places = getattr(model, "hf_device_map", None)
        offloaded = places is not None and "disk" in map(str, places.values())
        if places is None or (len(set(map(str, places.values()))) == 1 and not offloaded):
            left = [n for n, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
            if left:
                raise CheckpointError(f"{left[0]}: was not loaded; the checkpoint is incomplete")
            check.check_values(model, codes=comparison is None)
            if not self.pre_quantized:
                self._share_embedder(model)
        arrange_weights(model)
        for block in fusible_blocks(model).values():
            examine(block)
        return model

    def _share_embedder(self, model: Any) -> None:
        """Keep and store an embedder once that is equal in all blocks."""
        scheme = self.quantization_config.scheme
        if skeleton.has_shared_embedder(model, family_of(scheme.architecture)):
            shared = replace(scheme, shared_embedder=True)
            self.quantization_config = DitqConfig(shared, self.quantization_config.recipe)
            model.register_to_config(quantization_config=self.quantization_config)
            skeleton.share_embedder(model, family_of(scheme.architecture))
            self.absent = skeleton.duplicate_embedders(model, shared)

    def _dequantize(self, model: Any) -> Any:
        """In place, as diffusers' own quantizers do: the model becomes its float twin."""
        twin = float_twin(model)
        vars(model).clear()
        vars(model).update(vars(twin))
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
        own = without_peft(state_dict)
        return {key: value for key, value in own.items() if not self._is_absent(key)}, {}

    def _is_absent(self, key: str) -> bool:
        adapter = f".{ADAPTERS}." in key
        return adapter or key.startswith(tuple(f"{prefix}." for prefix in self.absent))


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
    refuse_methods(model)
    save_with_digests(model)


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

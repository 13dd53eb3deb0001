"""diffusers' checks of any quantizer, with ditq for the quantizer: `QuantizationTesterMixin` of their source tree.

Run by pytest inside of that tree (`command.py`), where its tests are the package `tests`.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ditq_runtime

THEIRS: Any = importlib.import_module("tests.models.testing_utils.quantization")
THEIRS.QuantizationTesterMixin.pytestmark = []  # it asks for a GPU, which is not needed
MODELS = {  # name -> module of their test, class with its sizes and inputs
    "Dit": ("test_models_dit_transformer2d", "DiTTransformer2DTesterConfig"),
    "PixArt": ("test_models_pixart_transformer2d", "PixArtTransformer2DTesterConfig"),
    "Sd3": ("test_models_transformer_sd3", "SD3TransformerTesterConfig"),
    "Flux": ("test_models_transformer_flux", "FluxTransformerTesterConfig"),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "w8": {"weights": "w8"},
    "w8_asymmetric": {"weights": "w8", "activations": "token_asym"},
}


class DitqTester(THEIRS.QuantizationTesterMixin):  # type: ignore[misc]
    """What their mixin asks of a backend."""

    made_by_ditq = True
    sharded_serialization_config = CONFIGS["w8"]
    original: type

    @property
    def model_class(self) -> Any:
        """Diffusers' own, as it is."""
        return self.original

    def _saved(self) -> Path:
        """A float model of theirs, on disk."""
        if "folder" not in vars(type(self)):
            torch.manual_seed(0)
            type(self).folder = tempfile.TemporaryDirectory()  # type: ignore[attr-defined]
            self.original(**self.get_init_dict()).save_pretrained(self.folder.name)
        return Path(self.folder.name)

    def _load_unquantized_model(self) -> Any:
        return self.model_class.from_pretrained(self._saved())

    def _create_quantized_model(self, config_kwargs: dict[str, Any], **extra: Any) -> Any:
        config = ditq_runtime.DitqConfig(**config_kwargs)
        return self.model_class.from_pretrained(self._saved(), quantization_config=config, **extra)

    def _verify_if_layer_quantized(self, name: str, module: nn.Module, config: Any) -> None:
        assert isinstance(module, ditq_runtime.QuantLinear), f"{name} is a {type(module).__name__}"
        assert module.format.weights != "fp32", f"{name} is float"


def _calls(check: str, *more: Any, needs_folder: bool = False) -> Any:
    """A test of theirs, for each of `CONFIGS`."""

    @pytest.mark.parametrize("name", CONFIGS)
    def test(self: Any, name: str, tmp_path: Path) -> None:
        given = (tmp_path,) if needs_folder else more
        getattr(self, f"_test_{check}")(CONFIGS[name], *given)

    return test


for check in (
    "quantization_num_parameters", "quantization_memory_footprint", "quantization_inference",
    "quantization_dtype_assignment", "quantization_lora_inference", "quantization_config_serialization",
    "quantized_layers", "keep_modules_in_fp32", "original_dtype", "quantization_device_map",
    "quantization_cpu_device_map", "dequantize", "quantization_training",
):  # fmt: skip
    setattr(DitqTester, f"test_{check}", _calls(check))
DitqTester.test_serialization = _calls("quantization_serialization", needs_folder=True)
DitqTester.test_modules_to_not_convert = _calls("quantization_modules_to_not_convert", ["attn"])

for name, (module, config) in MODELS.items():
    found = getattr(importlib.import_module(f"tests.models.transformers.{module}"), config)
    body = {"original": found().model_class}
    globals()[f"TestDitq{name}"] = type(f"TestDitq{name}", (DitqTester, found), body)
del found

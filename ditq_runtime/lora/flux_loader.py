"""Flux's LoRA loader of diffusers looks at shapes of weights; 4-bit codes have half of their columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPAND = "_maybe_expand_transformer_param_shape_or_error_"


def enter_flux_loader() -> None:
    """Tell it the sizes of packed linears; called once diffusers' loaders are imported."""
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin as Loader

    stock = Loader._calculate_module_shape

    def shape_of(
        model: Any, base_module: Any = None, base_weight_param_name: str | None = None
    ) -> Any:
        from ditq_runtime.layers.linear import QuantLinear  # not above: importing is light

        module = base_module
        if module is None and base_weight_param_name is not None:
            modules = dict(model.named_modules(remove_duplicate=False))
            module = modules.get(base_weight_param_name.removesuffix(".weight"))
        if isinstance(module, QuantLinear):
            return (module.out_features, module.in_features)
        return stock(model, base_module, base_weight_param_name)

    Loader._calculate_module_shape = staticmethod(shape_of)
    expand = vars(Loader)[EXPAND].__func__

    def expand_or_refuse(
        cls: Any, transformer: Any, lora_state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        _check_sizes(transformer, lora_state_dict or {})
        return expand(cls, transformer, lora_state_dict, *args, **kwargs)

    setattr(Loader, EXPAND, classmethod(expand_or_refuse))


def _check_sizes(transformer: Any, state: Mapping[str, Any]) -> None:
    """ValueError for an adapter that would widen a packed linear, which diffusers does by a new float weight."""
    from ditq_runtime.layers.linear import QuantLinear  # as above

    for key, down in state.items():
        name = key.removesuffix(".lora_A.weight").removeprefix("transformer.")
        up = state.get(key.replace(".lora_A.", ".lora_B."))
        module = _named(transformer, name) if name != key else None
        if up is not None and isinstance(module, QuantLinear):
            sizes, given = (module.in_features, module.out_features), (down.shape[1], up.shape[0])
            if given != sizes:
                raise ValueError(
                    f"load_lora_weights: {name} has K, N = {sizes}, but the adapter is for {given}, and integers "
                    "cannot be widened; convert with --keep for that layer"
                )


def _named(model: Any, name: str) -> Any:
    for part in name.split("."):
        model = getattr(model, part, None)
    return model

"""The float model that a packed one stands for: `model.dequantize()`, `num_parameters()`."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights

from ditq_runtime.host.on_the_fly import scale_rows
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.modulation_table import ModulationTable
from ditq_runtime.layers.site import Site
from ditq_runtime.layers.timestep_freq import set_timestep_freq
from ditq_runtime.lora.adapter import row_factors

UNFOLDED = ("quantizer", "adaln", "value", "product")  # places whose factors can be taken out again


def float_skeleton(model: Any) -> Any:
    """The float model of a packed one's class and sizes, on meta."""
    config = {k: v for k, v in dict(model.config).items() if k != "quantization_config"}
    with init_empty_weights():
        return type(model).from_config(config)


def num_parameters(
    model: Any, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """The parameters of the float model: scales and codes are no parameters, and none of them is trained."""
    if only_trainable:
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    count: int = float_skeleton(model).num_parameters(exclude_embeddings=exclude_embeddings)
    return count


def float_twin(model: Any) -> Any:
    """A float model with the weights that the integers stand for, unfolded: diffusers' own class, fp32.

    It computes what the packed model computes but for the rounding of activations.

    Raises:
        ValueError: the model has a bias per timestep group, which a stock model of its class has no place for, or
            shifts or factors of norms that were folded, where the file does not say into which.
    """
    sites = [m for m in model.modules() if isinstance(m, Site)]
    for module in model.modules():
        grouped = isinstance(module, QuantLinear) and module.format.groups > 1
        shifted = isinstance(module, Site) and module.format.shifts > (not module.format.is_folded)
        elsewhere = isinstance(module, Site) and module.format.place not in UNFOLDED
        if grouped or shifted or elsewhere:
            raise ValueError(
                f"dequantize: this {type(model).__name__} has timestep groups, folded shifts or factors in its norms, "
                "which cannot be taken out of it again; take the float model it was made from"
            )
    twin = float_skeleton(model)
    direct = scale_rows(float_skeleton(model))
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if isinstance(module, QuantLinear) and module.bias is not None:
            stock: Any = twin.get_submodule(name)
            if stock.bias is None:
                raise ValueError(
                    f"dequantize: {name} got a bias from a shift, which a stock {type(model).__name__} has no place "
                    "for; take the float model it was made from"
                )
    held = dict(model.state_dict())
    state = {}
    for name, like in twin.state_dict().items():
        owner, _, field = name.rpartition(".")
        layer = modules.get(name, modules.get(owner))
        if isinstance(layer, QuantLinear):
            found = _of_linear(owner, layer, field, sites, direct)
        elif isinstance(layer, ModulationTable):
            found = _of_table(name, layer, sites, direct).reshape(like.shape)
        else:
            found = held[name]
        state[name] = found.to(torch.float32) if found.is_floating_point() else found
    twin.load_state_dict(state, assign=True)
    for name, buffer in model.named_buffers():
        owner, _, field = name.rpartition(".")
        setattr(twin.get_submodule(owner), field, buffer.clone())
    scheme = model.config.quantization_config.scheme
    set_timestep_freq(twin, scheme.timestep_freq)
    twin.hf_quantizer = model.hf_quantizer  # diffusers deletes it from what it is given
    return twin.eval().requires_grad_(False)


def _of_linear(
    name: str, layer: QuantLinear, field: str, sites: list[Site], direct: dict[str, list[slice]]
) -> torch.Tensor:
    """Weight [N, K] or bias [N] of a linear, fp64."""
    rows = _factors(name, layer.out_features, sites)
    if field == "bias":
        bias = layer.bias.double().cpu()
        for (
            site
        ) in sites:  # it holds W z, with W as it was before rounding; the quantizer subtracts z
            if name in site.format.readers and site.shift is not None:
                bias = bias - (
                    _of_linear(name, layer, "weight", sites, direct) @ site.shift[0].double().cpu()
                )
        bias = bias / rows
        for part in direct.get(name, ()) if layer.wide_output else ():
            bias[part] -= 1
        return bias
    weight = layer.dequantized_weight().double().cpu()
    if layer.format.lora_rank:
        weight = weight + layer.lora_up.double().cpu() @ layer.lora_down.double().cpu()
    for site in sites:
        if name in site.format.readers:
            if site.smooth_inv is not None:
                weight = weight * site.smooth_inv.double().cpu()
            if site.scale is not None:
                weight = weight / site.scale.double().cpu()
    return weight / rows[:, None]


def _of_table(
    name: str, table: ModulationTable, sites: list[Site], direct: dict[str, list[slice]]
) -> torch.Tensor:
    values = table.bias.double().cpu() / table.weight.double().cpu()
    for part in direct.get(name, ()):
        values[part] -= 1
    return values


def _factors(name: str, num_rows: int, sites: list[Site]) -> torch.Tensor:
    """[N] fp64: what folds multiplied the rows of a producer by."""
    factors = torch.ones(num_rows, dtype=torch.float64)
    for site in sites:
        if name in site.format.producers and site.scale is not None:
            factors = factors * row_factors(site, site.format.producers[name], num_rows)
    return factors

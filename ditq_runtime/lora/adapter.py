"""Low-rank adapters of the float model on a packed one, exact also where a factor was folded away.

A folded linear reads x' = (x - z_g) u with u = 1 / s, and its rows may have been scaled for a consumer. The float
model's update B A x is therefore applied as

    diag(u_out) B (A diag(s)) x'  +  diag(u_out) B A z_g        u_out: rows scaled for a consumer, else 1

PEFT would feed x' to A, silently wrong: `ditq_runtime.host.guards` refuses it on folded linears.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.site import Site
from ditq_runtime.layers.timestep_groups import of_groups
from ditq_runtime.lora.file import Adapter, read_adapters

ADAPTERS = "adapters"  # name of the module in a linear that holds its branches
ADAPTER_OPS = ["aten.mm", "aten.mm"]  # what a branch runs: down, up


def load_lora(
    target: Any,
    source: str | Path | Mapping[str, torch.Tensor],
    name: str = "default",
    scale: float = 1.0,
) -> list[str]:
    """Add a LoRA that was trained on the float model to a packed transformer.

    The adapter stays beside the integer weights, in the compute dtype; `save_pretrained` does not write it. Load it
    before offloading, and before compiling.

    Args:
        target: a pipeline with a packed `transformer`, or the transformer.
        source: a `.safetensors` file, a folder written by PEFT or diffusers, or a state dict.
        name: to unload it by.
        scale: multiplies the adapter's own alpha / r.

    Returns:
        The names of the linears that gained a branch.

    Raises:
        ValueError: the model is not packed, or is offloaded; a name in use; a layer that the model lacks or that has
            other sizes; anything that is not a plain LoRA. Nothing is changed then.
    """
    model = _packed(target, "load_lora")
    adapters = read_adapters(source)
    folds = [m for m in model.modules() if isinstance(m, Site) and m.format.is_folded]
    linears: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    branches: list[tuple[Any, LoraBranch]] = []
    for layer, adapter in adapters.items():
        linear = linears.get(layer)
        _check(layer, linear, adapter, name)
        branches.append((linear, _branch(folds, layer, linear, adapter, scale)))
    for linear, branch in branches:
        if not hasattr(linear, ADAPTERS):
            setattr(linear, ADAPTERS, nn.ModuleDict())
            linear.register_forward_hook(_add_branches)
        getattr(linear, ADAPTERS)[name] = branch
    return list(adapters)


def unload_lora(target: Any, name: str = "default") -> None:
    """Remove a LoRA.

    Args:
        target: as given to `load_lora`.
        name: of the adapter.

    Raises:
        ValueError: no adapter has this name.
    """
    model = _packed(target, "unload_lora")
    found = [m for m in model.modules() if name in getattr(m, ADAPTERS, ())]
    if not found:
        raise ValueError(f"unload_lora: no adapter is called {name!r}")
    for linear in found:
        del getattr(linear, ADAPTERS)[name]
        if not getattr(linear, ADAPTERS):
            _forget_adapters(linear)


def _forget_adapters(linear: nn.Module) -> None:
    """Take out what the first adapter brought: its block may run fused again."""
    delattr(linear, ADAPTERS)
    hooks = linear._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _add_branches]:
        del hooks[key]


class LoraBranch(nn.Module):
    """up @ (down @ x) + bias, added to a linear's output.

    Attributes:
        down: [r, K] in the linear's compute dtype.
        up: [N, r].
        bias: fp32 [N], or [G, N] with timestep groups, or None.
    """

    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Keep; nothing is trained here."""
        super().__init__()
        self.down = nn.Parameter(down.contiguous(), requires_grad=False)
        self.up = nn.Parameter(up.contiguous(), requires_grad=False)
        kept = None if bias is None else nn.Parameter(bias.contiguous(), requires_grad=False)
        self.register_parameter("bias", kept)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add the branch of x [..., K] to y [..., N]; the sum is taken in fp32 or wider."""
        rows = x.reshape(-1, x.shape[-1]).to(self.down.dtype)
        branch = (rows @ self.down.t()) @ self.up.t()
        if self.bias is not None:
            table: torch.Tensor = self.bias
            if table.dim() == 2:
                table = of_groups(table, rows.shape[0])
            branch = branch + table
        wide = torch.promote_types(y.dtype, torch.float32)
        return (y.to(wide) + branch.to(wide).reshape(y.shape)).to(y.dtype)


def _add_branches(linear: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    for branch in getattr(linear, ADAPTERS).values():
        output = branch(args[0], output)
    return output


def _branch(
    folds: list[Site], layer: str, linear: Any, adapter: Adapter, scale: float
) -> LoraBranch:
    """The folded adapter, in the dtype and on the device of its linear."""
    strength = adapter.strength * scale
    down, up = adapter.down, adapter.up * strength
    bias = None if adapter.bias is None else adapter.bias[None] * strength
    for site in folds:
        if layer in site.format.readers:
            down, bias = _of_reader(site, down, up, bias)
    for site in folds:
        if layer in site.format.producers and site.scale is not None:
            rows = _row_factors(site, site.format.producers[layer], len(up))
            up, bias = up * rows[:, None], None if bias is None else bias * rows
    device, dtype = linear.weight.device, linear.weight.dtype
    if isinstance(linear, QuantLinear):
        dtype = torch.float32 if linear.wide_output else linear.compute_dtype
    if bias is not None:
        bias = (bias[0] if len(bias) == 1 else bias).to(device, torch.float32)
    return LoraBranch(down.to(device, dtype), up.to(device, dtype), bias)


def _of_reader(
    site: Site, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Down [r, K] and bias [1 or S, N] of the adapter of a linear that reads a folded site; all fp64."""
    if site.fold_shift is not None:
        term = site.fold_shift.double().cpu() @ down.t() @ up.t()  # B A z_g, [S, N]
        bias = term if bias is None else bias + term
    return (down if site.scale is None else down * site.scale.double().cpu()), bias


def _row_factors(site: Site, begins: tuple[int, ...], num_rows: int) -> torch.Tensor:
    """[N] fp64: what the fold of a site multiplied each row of a producer by."""
    assert site.scale is not None
    u, rows = 1 / site.scale.double().cpu(), torch.ones(num_rows, dtype=torch.float64)
    for begin in begins:
        part = rows[begin : begin + len(u)]
        part.copy_(u[: len(part)])
    return rows


def _packed(target: Any, caller: str) -> Any:
    model = target if isinstance(target, nn.Module) else getattr(target, "transformer", None)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if model is None or getattr(config, "scheme", None) is None:
        raise ValueError(
            f"{caller}: {type(target).__name__} holds no packed ditq transformer; a float model takes "
            "load_lora_weights of diffusers"
        )
    return model


def _check(layer: str, linear: Any, adapter: Adapter, name: str) -> None:
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"load_lora: {layer} is no linear of the model; was the adapter trained on another architecture?"
        )
    sizes = (linear.in_features, linear.out_features)
    if (adapter.down.shape[1], adapter.up.shape[0]) != sizes:
        raise ValueError(
            f"load_lora: {layer} has K, N = {sizes}, but the adapter is for "
            f"{(adapter.down.shape[1], adapter.up.shape[0])}"
        )
    if name in getattr(linear, ADAPTERS, {}):
        raise ValueError(
            f"load_lora: an adapter {name!r} is loaded; choose another name or unload_lora it"
        )
    hook = getattr(linear, "_hf_hook", None)
    if (
        linear.weight.is_meta
        or getattr(hook, "offload", False)
        or hasattr(linear, "_diffusers_hook")
    ):
        raise ValueError(
            f"load_lora: {layer} is offloaded; load the adapter first, then switch offloading on"
        )

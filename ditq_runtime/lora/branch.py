"""The branches of one linear, and the names by which diffusers and PEFT switch them.

`Adapters` has the methods of PEFT's `BaseTunerLayer` that the verbs of diffusers call (`set_adapters`, `disable_lora`,
`joint_attention_kwargs={"scale": ...}`), and is registered as one, so that they act on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ditq_kernels.codes.products import ieee
from ditq_runtime.layers.carrier import PerThread
from ditq_runtime.layers.timestep_groups import of_groups

ADAPTERS = "adapters"  # name of the module in a linear that holds its branches
ADAPTER_OPS = ["aten.mm", "aten.mm"]  # what a branch runs: down, up


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

    def forward(self, x: torch.Tensor, y: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """Add factor times the branch of x [..., K] to y [..., N]; the sum is taken in fp32 or wider."""
        rows = x.reshape(-1, x.shape[-1]).to(self.down.dtype)
        branch = _product(rows, self.down, self.up)
        if self.bias is not None:
            table: torch.Tensor = self.bias
            if table.dim() == 2:
                table = of_groups(table, rows.shape[0])
            branch = branch + table
        wide = torch.promote_types(y.dtype, torch.float32)
        branch = branch.to(wide).reshape(y.shape)
        return (y.to(wide) + (branch if factor == 1.0 else branch * factor)).to(y.dtype)

    def replace(self, other: LoraBranch | None) -> None:
        """Take the values of another branch of at most this rank, or become zero, at the same addresses."""
        mine = [self.down.data, self.up.data] + ([] if self.bias is None else [self.bias.data])
        for tensor in mine:
            tensor.zero_()
        if other is not None:
            rank = len(other.down)
            self.down.data[:rank].copy_(other.down)
            self.up.data[:, :rank].copy_(other.up)
            if self.bias is not None and other.bias is not None:
                self.bias.data.copy_(other.bias)

    def widen(self, rank: int) -> None:
        """Make room for adapters of a higher rank, which may replace this one later: zeros, which change nothing."""
        more = rank - len(self.down)
        if more > 0:
            self.down = _frozen(nn.functional.pad(self.down.data, (0, 0, 0, more)))
            self.up = _frozen(nn.functional.pad(self.up.data, (0, more)))


def _product(rows: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """In the dtype of the branch, whatever surrounds it: what it adds to is in the dtype of the layer."""
    device = rows.device.type
    with ieee(rows.device):
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return (rows @ down.t()) @ up.t()
        return (rows @ down.t()) @ up.t()


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


class _Call(PerThread):
    """What a forward asked for with `scale`: factors by the identity of the adapters they hold for.

    They belong to one forward, so to its thread; the adapters are shared.
    """

    def __init__(self) -> None:
        self.factors: dict[int, list[float]] = {}


_call = _Call()


class Adapters(nn.ModuleDict):
    """Name -> `LoraBranch` of one linear.

    Attributes:
        active: names of the adapters of the model that run, in the order they are added; as in PEFT, the same in all
            linears, also those that an adapter does not reach.
        weights: name -> the factor that `set_adapters` gave it.
        enabled: False: none runs.
    """

    adapter_layer_names = ()
    other_param_names = ()
    merged_adapters = ()
    merged = False

    def __init__(self) -> None:
        """None yet."""
        super().__init__()
        self.active: list[str] = []
        self.weights: dict[str, float] = {}
        self.enabled = True

    def add(self, name: str, branch: LoraBranch) -> None:
        """Another branch; `set_adapter` lets it run."""
        self[name] = branch
        self.weights[name] = 1.0

    def running(self) -> Iterator[tuple[LoraBranch, float]]:
        """The branches that run now, with their factors."""
        if self.enabled:
            factors = _call.factors.get(id(self))
            scale = factors[-1] if factors else 1.0
            for name in filter(self.__contains__, self.active):
                branch: Any = self[name]
                yield branch, self.weights[name] * scale

    @property
    def r(self) -> dict[str, int]:
        """Name -> rank."""
        branches: dict[str, Any] = dict(self.items())
        return {name: len(branch.down) for name, branch in branches.items()}

    @property
    def lora_A(self) -> Adapters:
        """What `set_lora_device` of a pipeline looks adapters up in, and moves."""
        return self

    lora_B = lora_A

    @property
    def active_adapters(self) -> list[str]:
        """Names of the branches that run while adapters are enabled."""
        return list(self.active)

    active_adapter = active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are off."""
        return not self.enabled

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all of them; `active` stays."""
        self.enabled = enabled

    def set_adapter(self, names: str | list[str], inference_mode: bool = True) -> None:
        """Let these run, as far as this linear has them, and no others."""
        self.active = [names] if isinstance(names, str) else list(names)

    def set_scale(self, name: str, scale: float) -> None:
        """Multiply one of them from now on. After a forward with scale 0, diffusers asks for 1: that ends the 0."""
        factors = _call.factors.get(id(self))
        if factors and factors[-1] == 0:
            if name == self.active[-1]:
                self.unscale_layer(scale)
        elif name in self:
            self.weights[name] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply what runs in this thread, until `unscale_layer`."""
        if not self.active:
            return
        factors = _call.factors.setdefault(id(self), [])
        factors.append(scale * (factors[-1] if factors else 1.0))

    def unscale_layer(self, scale: float | None = None) -> None:
        """End the last `scale_layer`; None: all of them."""
        factors = _call.factors.get(id(self))
        if factors:
            factors.pop()
            if scale is None or not factors:
                del _call.factors[id(self)]

    def delete_adapter(self, name: str) -> None:
        """Forget one; `unload_lora` of the model also takes out what the last one leaves."""
        if name in self:
            del self[name]
            del self.weights[name]
        if name in self.active:  # as in PEFT: another one runs then, if there is any
            self.active = [n for n in self.active if n != name] or sorted(self)[:1]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """ValueError: it stays beside the integers."""
        raise ValueError(
            "merge: not possible on a packed ditq transformer: an adapter cannot be merged into integer weights; "
            "leave it beside them, unfused"
        )

    def unmerge(self) -> None:
        """None was merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """It is folded: not the float model's adapter any more."""
        return False


def add_branches(linear: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """The forward hook of a linear with adapters."""
    for branch, factor in getattr(linear, ADAPTERS).running():
        output = branch(args[0], output, factor)
    return output


def num_running(linear: nn.Module) -> int:
    """How many branches of a linear run."""
    adapters = getattr(linear, ADAPTERS, None)
    return 0 if adapters is None else sum(1 for _ in adapters.running())


def enter_peft() -> None:
    """Make PEFT's and diffusers' verbs take `Adapters` for layers with adapters; called once PEFT is imported."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    BaseTunerLayer.register(Adapters)

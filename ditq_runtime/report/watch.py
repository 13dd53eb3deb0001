"""One forward of a transformer seen from below: which operators ran in which linear, attention and fused block."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ditq_kernels.ops.library import plan_fault
from ditq_runtime.errors import FallbackError
from ditq_runtime.families.fusible import OBSERVES, fusible_blocks, why_not
from ditq_runtime.layers.carrier import here
from ditq_runtime.report.attention import Operation, operation
from ditq_runtime.report.fused import BlockRun, FusedBlock

FLOAT_GEMMS = frozenset({"mm", "addmm", "bmm", "linear", "matmul", "_int_mm"})
WRAPPED = ".base_layer"  # where PEFT's layers keep the linear they stand for


def without_adapter(name: str) -> str:
    """The name of a linear as it is without PEFT's layer around it."""
    return name.removesuffix(WRAPPED)


class Watch(TorchDispatchMode):
    """Notes, for every linear and every attention, the operators that ran inside its forward, but not in a linear.

    A block that is about to run fused calls neither: it is watched as a whole. Hooks inside of it would unfuse it.

    Attributes:
        products: name of an attention -> what ran in it.
        ran: name of a linear -> the products that ran in it.
        rows: name of a linear -> rows of its inputs.
        order: names of linears, as they first ran.
        blocks: how each block that could be fused runs.
        fused: name of a block that runs fused -> what ran in it.
        fused_ops: name of a linear in such a block -> the ops it took part in; after `finish`.
        fused_attentions: names of attentions in such blocks; after `finish`.
    """

    supports_higher_order_operators = True  # flex attention is one

    def __init__(self, model: nn.Module, attentions: list[str], unfused: str = "") -> None:
        """Watch nothing yet; `unfused` says why no block will run fused in this forward, whatever it could."""
        super().__init__()
        reasons = {name: unfused or why_not(block) for name, block in fusible_blocks(model).items()}
        self.blocks = [BlockRun(name, not reason, reason) for name, reason in reasons.items()]
        self.fused = {
            run.name: FusedBlock(run.name, model.get_submodule(run.name))
            for run in self.blocks
            if run.fused
        }
        bypassed = {
            f"{name}.{part}" for name, block in self.fused.items() for part in block.bypassed
        }
        self._linears = {
            module: without_adapter(name)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name not in bypassed
        }
        self._attentions = {
            model.get_submodule(name): name for name in attentions if name not in bypassed
        }
        self.products: dict[str, list[Operation]] = {}
        self.ran: dict[str, list[str]] = {}
        self.rows: dict[str, int] = {}
        self.fused_ops: dict[str, list[str]] = {}
        self.fused_attentions: set[str] = set()
        self.order: list[str] = []
        self._inside: list[str] = []
        self._faults: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Watch:
        """Hook the modules."""
        entries: list[tuple[nn.Module, Any]] = []
        entries += [(m, self._enter_layer(name)) for m, name in self._linears.items()]
        entries += [(m, self._enter_attention(name)) for m, name in self._attentions.items()]
        entries += [(b.block, self._enter_block(name)) for name, b in self.fused.items()]
        for module, enter in entries:
            self._hooks.append(module.register_forward_pre_hook(self._observer(enter)))
            self._hooks.append(module.register_forward_hook(self._observer(self._leave)))
        here().watch = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Take the hooks out."""
        super().__exit__(*error)
        here().watch = None
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note one operator and run it."""
        if self._inside:
            space, _, rest = str(func).partition(".")
            name = rest.partition(".")[0]
            fault = plan_fault(name, args) if space == "ditq" else ""
            if fault:
                self._faults.append(f"{self._inside[-1]}: {fault}; start the process again")
            self._note(self._inside[-1], space, name, args)
        return func(*args, **(kwargs or {}))

    def _note(self, inside: str, space: str, name: str, args: tuple[Any, ...]) -> None:
        if inside in self.ran:
            if space == "ditq" or name in FLOAT_GEMMS:
                self.ran[inside].append(f"{space}.{name}")
            return
        product = operation(f"{space}.{name}", args)
        if product is None:
            return
        if inside in self.products:
            self.products[inside].append(product)
            return
        for owner in self.fused[inside].note(product, args):
            if owner not in self.rows:
                self.order.append(owner)
                self.rows[owner] = args[0].shape[0]

    def linear(self, name: str) -> nn.Linear | None:
        """The linear that was watched under a name; None for one of a fused block."""
        found: dict[str, nn.Linear] = {known: module for module, known in self._linears.items()}
        return found.get(name)

    def finish(self) -> None:
        """Give the operators of fused blocks to their linears and attentions.

        Raises:
            FallbackError: a fused block ran something else, or a plan of an op, which runs where nobody watches, is not
                what the op runs.
        """
        if self._faults:
            raise FallbackError(self._faults[0])
        for block in self.fused.values():
            self.fused_ops |= block.ops_of_linears()
            attentions = block.attentions()
            self.products |= attentions
            self.fused_attentions |= attentions.keys()

    def _observer(self, hook: Any) -> Any:
        """A hook of ours: it changes nothing, and forwards of other threads pass it by."""

        def observe(*given: Any) -> None:
            if here().watch is self:
                hook(*given)

        setattr(observe, OBSERVES, True)
        return observe

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()

    def _enter_layer(self, name: str) -> Any:
        def enter(module: nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
            if name not in self.ran:
                self.order.append(name)
                self.ran[name], self.rows[name] = [], 0
            self.rows[name] += args[0].numel() // module.in_features
            self._inside.append(name)

        return enter

    def _enter_attention(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self.products.setdefault(name, [])
            self._inside.append(name)

        return enter

    def _enter_block(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self._inside.append(name)

        return enter

"""The `ditq::` library of torch: definitions, one implementation for every device, fakes, no gradients.

`torch.library.custom_op` costs five small linears a call, mostly for autograd; a definition with an implementation
costs two, a kept plan less. Gradients fall through: an op has none, and `ditq::inference_only` raises for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ditq_kernels.launch import backend, plans
from ditq_kernels.launch.surroundings import undisturbed

LIBRARY = torch.library.Library("ditq", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
OPS: dict[str, "Op"] = {}


@dataclass(frozen=True)
class Op:
    """An op below its public function, whose arguments were checked.

    Attributes:
        name: such as "gemm_w8a8".
        overload: what torch's dispatcher knows.
        definition: the module of the reference.
        function: its name there.
    """

    name: str
    overload: torch._ops.OpOverload
    definition: ModuleType
    function: str

    def by_plan(self, arguments: plans.Arguments, given: plans.Arguments | None = None) -> Any:
        """The result of a call that needs no checks; None where it must be checked first.

        Args:
            arguments: of the implementation.
            given: the same as `signature.flat` makes them, where there are lists.
        """
        return plans.kept(self.name, arguments, arguments if given is None else given)

    def __call__(self, *arguments: Any) -> Any:
        """Run it, and keep a plan for the next call of this signature."""
        if plans.direct(arguments):
            return plans.run(self, arguments)
        return _through_dispatcher(self.overload, arguments)

    def implementation(self, device: torch.device) -> Callable[..., Any]:
        """What runs on a device."""
        reference = getattr(self.definition, self.function)
        return backend.implementation(self.name, device, reference)


def define(schema: str, definition: ModuleType, fake: Callable[..., Any], function: str = "") -> Op:
    """Make an op known to torch.

    Args:
        schema: such as "lora_down(Tensor q, Tensor down) -> Tensor"; the first argument is a tensor.
        definition: the module whose function of this name is the reference.
        fake: outputs of the right shape, dtype and strides from the op's arguments.
        function: name of the reference where it is not the op's.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=TAGS)
    made = Op(name, getattr(torch.ops.ditq, name).default, definition, function or name)

    def run(*arguments: Any) -> Any:
        with undisturbed():
            return made.implementation(arguments[0].device)(*arguments)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"ditq::{name}", fake, lib=LIBRARY)
    OPS[name] = made
    return made


def plan_fault(name: str, arguments: plans.Arguments) -> str:
    """What is wrong with the plan that a plain call of an op would run; empty if nothing is, or none is kept.

    Args:
        name: such as "gemm_w8a8"; other names have no plans.
        arguments: as the dispatcher passes them: trailing ones that have their default may be missing.
    """
    op = OPS.get(name)
    if op is None:
        return ""
    missing = op.overload._schema.arguments[len(arguments) :]
    return plans.fault_of(op, (*arguments, *(argument.default_value for argument in missing)))


LIBRARY.define("inference_only(Tensor y, Tensor cause) -> Tensor", tags=TAGS)
LIBRARY.impl("inference_only", lambda y, cause: y.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("ditq::inference_only", lambda y, cause: y.clone(), lib=LIBRARY)


def _refuse(ctx: Any, *gradients: torch.Tensor) -> None:
    raise RuntimeError(
        "backward: the ops of ditq are for inference and have no gradients, got a tensor that requires one; "
        "run the model under torch.no_grad(), or train the float model"
    )


torch.library.register_autograd("ditq::inference_only", _refuse, lib=LIBRARY)


def _through_dispatcher(op: torch._ops.OpOverload, arguments: plans.Arguments) -> Any:
    """Call an op; its float results refuse a backward pass where an argument asks for one."""
    result = op(*arguments)
    if not torch.is_grad_enabled():
        return result
    cause = next((a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad), None)
    if cause is None:
        return result
    if isinstance(result, torch.Tensor):
        return _refusing(result, cause)
    return tuple(_refusing(part, cause) for part in result)


def _refusing(y: torch.Tensor, cause: torch.Tensor) -> torch.Tensor:
    return torch.ops.ditq.inference_only(y, cause) if y.is_floating_point() else y

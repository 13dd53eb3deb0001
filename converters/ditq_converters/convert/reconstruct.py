"""Reconstruction: learn the rounding of a whole block, so that it makes what the float block makes.

BRECQ (Li et al., arXiv:2102.05426) over AdaRound's relaxation (`learned`), as PTQ4DiT (arXiv:2405.16005) rounds its
weights: Adam lowers the squared error of the block's outputs, on calls behind all that is quantized before it, towards
the float model's outputs; a second term drives every code to one of its two neighbours. Steps of static activations
are learned along. We depart from it in four things. Learning starts from aimed rounding, not from the nearest, and so
takes hundreds of iterations where theirs takes 20000. Biases are learned too. The weight of the second term rises, in
units of the block's error before, until no code is left between; and what is not better than before on the calls, true
codes against true codes, is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ditq_converters.convert.aim import Aim
from ditq_converters.convert.emulated import Emulated, Rounded
from ditq_converters.convert.learned import Learned
from ditq_converters.convert.prefix import Prefix
from ditq_converters.sites.trace import tensors_in
from ditq_runtime.format.stored_weight import stored_tensors

CODE_RATE = 0.03  # of Adam, for what lies between two codes
BIAS_RATE = 1e-4  # in units of the largest bias of a linear
STEP_RATE = 4e-5  # of the logarithm of a static step; PTQ4DiT's of the step
WARM_UP = 0.2  # part of the iterations before codes are hardened
HARDENING = (
    10.0,
    1e4,
)  # weight of that term from then to the end, in units of the block's error before
SHARPNESS = (20.0, 2.0)  # its exponent, likewise
Tell = Callable[[int, int, float], None]  # iteration, of how many, error of its call


def reconstruct(
    aim: Aim,
    rounded: dict[str, Rounded],
    iterations: int,
    seed: int = 0,
    tell: Tell | None = None,
) -> dict[str, Rounded]:
    """Learn the rounding of a block whose linears are finished.

    Args:
        aim: of the block.
        rounded: name inside the block -> the linear as it is rounded, of those to learn.
        iterations: steps of Adam, each on one call.
        seed: of the order of the calls.
        tell: is told, after each iteration, its number, how many there are, and the error of its call in units of the
            mean before learning.

    Returns:
        Name -> the linear after learning; none where nothing was gained on the calls. The prefix has them too.
    """
    wanted = aim.prefix.made(finished=False)
    start = _error(aim.prefix, wanted)
    if start == 0:
        return {}
    learned = _learned(aim, rounded)
    for name, module in learned.items():
        aim.prefix.finish(f"{aim.block}.{name}", module)
    with torch.enable_grad():
        errors = _descend(aim.prefix, wanted, learned, start, iterations, seed)
        for step, error in enumerate(errors, start=1):
            if tell is not None:
                tell(step, iterations, error)
    found = {name: _rounded(module, rounded[name]) for name, module in learned.items()}
    for name, one in found.items():
        aim.finish(name, one)
    if _error(aim.prefix, wanted) < start:
        return found
    for name, one in rounded.items():
        aim.finish(name, one)
    return {}


def _descend(
    prefix: Prefix,
    wanted: list[Any],
    learned: dict[str, Learned],
    start: float,
    iterations: int,
    seed: int,
) -> Iterator[float]:
    """Learn; gives the error of every step in units of `start`."""
    adam = torch.optim.Adam(_parameters(learned))
    moved = [parameter for group in adam.param_groups for parameter in group["params"]]
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(iterations):
        order = order or torch.randperm(prefix.num_calls, generator=generator).tolist()
        call = order.pop()
        error = distance(prefix.run(call, finished=True), wanted[call]) / start
        loss = error + _hardening(learned, (step / iterations - WARM_UP) / (1 - WARM_UP))
        for parameter, slope in zip(moved, torch.autograd.grad(loss, moved), strict=True):
            parameter.grad = slope  # `backward` would leave gradients in the float model too
        adam.step()
        yield float(error.detach())


def _hardening(learned: dict[str, Learned], past: float) -> torch.Tensor | float:
    """AdaRound's term, 1 - |2h - 1|^b in the mean over all codes; nothing before the warm-up is over."""
    if past <= 0:
        return 0.0
    weight = HARDENING[0] * (HARDENING[1] / HARDENING[0]) ** past
    sharpness = SHARPNESS[0] + past * (SHARPNESS[1] - SHARPNESS[0])
    soft = [(1 - (2 * m.between - 1).abs() ** sharpness).sum() for m in learned.values()]
    return weight * torch.stack(soft).sum() / sum(m.v.numel() for m in learned.values())


def _parameters(learned: dict[str, Learned]) -> list[dict[str, Any]]:
    """What Adam moves, and how fast."""
    steps = {id(m.log_step): m.log_step for m in learned.values() if m.log_step is not None}
    groups: list[dict[str, Any]] = [{"params": [m.v for m in learned.values()], "lr": CODE_RATE}]
    if steps:
        groups.append({"params": list(steps.values()), "lr": STEP_RATE})
    for bias in (module.bias for module in learned.values()):
        if bias is not None and bool(bias.detach().any()):
            groups.append({"params": [bias], "lr": BIAS_RATE * float(bias.detach().abs().max())})
    return groups


def distance(found: Any, wanted: Any) -> torch.Tensor:
    """Sum of squared differences of all floating tensors of two trees, fp32 scalar."""
    ours, theirs = _floats(found), _floats(wanted)
    terms = [(a.float() - b.float()).square().sum() for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(terms).sum()


def _floats(tree: Any) -> list[torch.Tensor]:
    return [t for t in tensors_in(tree) if t.is_floating_point()]


@torch.no_grad()
def _error(prefix: Prefix, wanted: list[Any]) -> float:
    """Mean over calls of the block's squared error."""
    errors = [
        float(distance(prefix.run(call, finished=True), wanted[call]))
        for call in range(prefix.num_calls)
    ]
    return sum(errors) / len(errors)


def _learned(aim: Aim, rounded: dict[str, Rounded]) -> dict[str, Learned]:
    """What stands in for the linears while they are learned; readers of one static range share its step."""
    steps: dict[str, nn.Parameter] = {}
    found = {}
    for name in rounded:
        module = aim.prefix.seen.get_submodule(f"{aim.block}.{name}")
        assert isinstance(module, Emulated)
        assert module.site is not None
        log_step = None
        if module.site.is_static:
            fresh = nn.Parameter(module.site.act_scale.detach().log())
            log_step = steps.setdefault(aim.site[name], fresh)
        found[name] = Learned(module, aim.targets[name], log_step)
    return found


def _rounded(module: Learned, before: Rounded) -> Rounded:
    """The linear after learning."""
    layer_format, stored = before.layer_format, dict(before.stored)
    codes = module.codes().to(torch.int8 if layer_format.weights == "w8" else torch.uint8)
    weight = module.before.layer.packed().with_codes(codes)
    stored |= stored_tensors(weight, layer_format)
    if "weight_sum" in stored:
        stored["weight_sum"] = weight.weight_sum()
    if module.bias is not None:
        stored["bias"] = module.bias.detach()
    quantizer = dict(before.quantizer)
    if module.log_step is not None:
        quantizer["act_scale"] = module.log_step.detach().exp()
    return Rounded(layer_format, _kept(stored), _kept(quantizer))


def _kept(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

"""Ops, layers and whole models in other surroundings: the bits must be those of a quiet process.

Layers are of random formats and sizes, in random surroundings. What stays float in whole models (embedders, the final
projection) follows its caller, as in any model of diffusers; it is kept steady here, so that the rest can be compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq_bench.stress.outcome import Tally
from ditq_bench.stress.threads import OTHERS, models, sampling, schedule
from ditq_runtime.attention.quantized import QuantAttention
from ditq_runtime.format.attention import AttentionFormat
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.site import SiteFormat
from ditq_runtime.format.stored_weight import quantize_weight, stored_tensors
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.site import Site
from ditq_runtime.surroundings import steady

THREADS = "threads"  # they change the order of sums in products of floats, in weight-only layers as in any other
Case = tuple[
    str, Callable[[], torch.Tensor], bool
]  # what, the run, whether its products are of integers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def _set(setter: Callable[[Any], object], value: object, back: object) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(back)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": lambda: torch.device("meta"),
    "matmul precision": lambda: _set(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    THREADS: lambda: _set(torch.set_num_threads, 2, torch.get_num_threads()),
    "random state": lambda: _set(torch.manual_seed, 77, 0),
}


MODELS = [
    ("htg", "w8", "static", "int8"),
    ("htg", "w4p", "token", "int8"),
    ("linear", "w4g", "token", "int8"),
]


def attack(cases: int, seed: int) -> list[Tally]:
    """Run random layers, each alone and in one to three surroundings."""
    tally = Tally("surroundings", seed)
    for number in range(cases):
        rng = random.Random(f"surroundings {seed} {number}")
        what, run, integers = rng.choice((_linear, _linear, _attention))(rng)
        around = [name for name in SURROUNDINGS if integers or name != THREADS]
        names = rng.sample(around, rng.choice((1, 1, 2, 3)))
        expected = run()
        try:
            with ExitStack() as stack:
                for name in names:
                    stack.enter_context(SURROUNDINGS[name]())
                found = run()
        except Exception as error:
            tally.add(number, f"{what} in {names}", error)
        else:
            same = found.dtype == expected.dtype and torch.equal(found, expected)
            tally.add(number, f"{what} in {names}", None, same)
    return [tally]


def attack_models(
    folder: Path, formats: Iterable[tuple[str, ...]] = MODELS, others: Iterable[str] = OTHERS
) -> list[Tally]:
    """Run whole packed models in each of the surroundings; their statistics are written below `folder`."""
    tally = Tally("surroundings: models", 0)
    for name, model in models(folder, formats, others):
        _hold_floats(model)
        run = sampling(model, schedule(2))
        expected = run()
        for number, (around, make) in enumerate(SURROUNDINGS.items()):
            try:
                with make():
                    found = run()
            except Exception as error:
                tally.add(number, f"{name} in {around}", error)
            else:
                pairs = list(zip(found, expected, strict=True))
                same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
                tally.add(number, f"{name} in {around}", None, same)
    return [tally]


def _hold_floats(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) in (nn.Linear, nn.Conv2d):
            module.forward = _held(module.forward)


def _held(
    forward: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        with _set(torch.set_num_threads, 1, torch.get_num_threads()), steady():
            return forward(x)

    return run


def _linear(rng: random.Random) -> Case:
    """A linear of any format behind its site."""
    weights = rng.choice(("w8", "w4p", "w4g", "fp32"))
    activations = (
        "none" if weights == "fp32" else rng.choice(("token", "token_asym", "static", "none"))
    )
    group = 32 if weights in ("w4p", "w4g") else None
    rank = rng.choice((0, 4)) if activations != "none" else 0
    form = LayerFormat(weights, activations, group, rng.random() < 0.7, 1, rank)
    k = 32 * rng.randrange(1, 7) if group else rng.randrange(1, 200)
    n, t, dtype = rng.randrange(1, 300), rng.randrange(1, 70), rng.choice(DTYPES)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    layer = QuantLinear(k, n, form, dtype, device="cpu")
    x = torch.randn(t, k, generator=generator).to(dtype)
    _fill(layer, torch.randn(n, k, generator=generator), generator)
    if activations != "none":
        site = Site(k, SiteFormat(("a.b",), activations, smooth=rng.random() < 0.5), "cpu")
        for name, parameter in site.named_parameters():
            parameter.data.fill_(0 if name == "act_zero" else 0.03)
        layer.read(site)
    integers = activations != "none" and not rank
    return f"{form} [{n}, {k}] of {t} {dtype}", lambda: layer(x).detach(), integers


def _fill(layer: QuantLinear, weight: torch.Tensor, generator: torch.Generator) -> None:
    form = layer.format
    if form.weights == "fp32":
        layer.weight.data = weight
    else:
        quantized = quantize_weight(weight, form)
        for name, tensor in stored_tensors(quantized, form).items():
            getattr(layer, name).data = tensor
    for name, (dtype, shape) in form.tensors(layer.in_features, layer.out_features).items():
        if name in ("bias", "lora_down", "lora_up", "weight_sum"):
            values = torch.randn(shape, generator=generator)
            getattr(layer, name).data = (values * 3).to(dtype)


def _attention(rng: random.Random) -> Case:
    """An attention between its projections."""
    form = AttentionFormat(rng.choice(("int8", "bf16")), rng.choice(("token", "static")))
    heads, d, dtype = rng.randrange(1, 4), rng.choice((32, 64, 72)), rng.choice(DTYPES)
    batch, rows, keys = rng.randrange(1, 3), rng.randrange(1, 50), rng.randrange(1, 50)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    core = QuantAttention(heads, form, d**-0.5, "cpu")
    for parameter in core.parameters():
        parameter.data.fill_(0.03)
    q, k, v = (
        torch.randn(batch, n, heads, d, generator=generator).to(dtype) for n in (rows, keys, keys)
    )
    return f"{form} {heads}x{d} {rows}x{keys} {dtype}", lambda: core(q, k, v).detach(), True

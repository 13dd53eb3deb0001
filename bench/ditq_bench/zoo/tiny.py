"""What an entry of the zoo is: a class, a tiny configuration, and the arguments of one forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

WIDTH = 64  # of transformers and of the texts that enter them
LATENTS = 16  # channels: four latents make a patch of WIDTH numbers
TEXT, SIDE = 8, 8  # tokens of a text; height and width of latents
HEADS = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}  # of 32 channels: widths 128 and 64
_WARNINGS = (
    "flex_attention called without",
    "In CPU autocast, but the target dtype",
)
ROPE = (8, 12, 12)  # channels of a head of 32 that turn with each of three coordinates


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch and diffusers warn of in the code of diffusers' own classes, on a CPU."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


@dataclass
class Draw:
    """Random tensors of one batch; equal seeds draw equal bits, whatever was drawn elsewhere."""

    batch: int
    generator: torch.Generator

    def normal(self, *shape: int) -> torch.Tensor:
        """[B, *shape] fp32."""
        return torch.randn(self.batch, *shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """[B, *shape] int64 in [0, high)."""
        return torch.randint(high, (self.batch, *shape), generator=self.generator)

    def times(self, scale: float = 1.0) -> torch.Tensor:
        """[B] fp32, a different timestep for each sample, in (0, scale)."""
        return scale * (torch.arange(self.batch, dtype=torch.float32) + 0.5) / (self.batch + 0.25)

    def mask(self, tokens: int = TEXT) -> torch.Tensor:
        """[B, tokens] bool, True where a token counts: each sample one fewer than the one before, the first all."""
        counts = torch.clamp(tokens - torch.arange(self.batch), min=2)
        return torch.arange(tokens) < counts[:, None]

    def text(self, width: int = WIDTH, tokens: int = TEXT) -> torch.Tensor:
        """[B, tokens, width] fp32."""
        return self.normal(tokens, width)

    def constant(self, *values: float) -> torch.Tensor:
        """[B, len(values)] fp32, the same row for each sample."""
        return torch.tensor([values]).expand(self.batch, -1).contiguous()


@dataclass(frozen=True)
class Tiny:
    """One transformer class of diffusers, tiny.

    `config` holds the arguments of its constructor, `example` makes those of its forward. `timestep` names the argument
    that carries the timestep: one, several, or None. `pipeline` builds a whole pipeline around the class, without a
    network, and `calls` are the keyword arguments of two calls of it; both are empty where there is none. `prepare`
    changes a model that was built, where one needs it.
    """

    name: str
    config: Mapping[str, Any]
    example: Callable[[Draw], dict[str, Any]]
    timestep: str | tuple[str, ...] | None = "timestep"
    pipeline: Callable[[], Any] | None = None
    calls: tuple[Mapping[str, Any], ...] = ()
    prepare: Callable[[Any], None] | None = None

    def build(self, seed: int = 0) -> nn.Module:
        """The model in eval mode, fp32, every parameter drawn anew: equal seeds give equal bits."""
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)  # constructors draw too, and some draw buffers
            model = getattr(diffusers, self.name)(**self.config)
            if self.prepare:
                self.prepare(model)
        return redraw(model, seed)

    def inputs(self, model: nn.Module, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of one forward of `model`, in shapes and ranges that the class's pipeline passes."""
        del model  # shapes follow from the configuration, which is ours
        return self.example(Draw(batch, torch.Generator().manual_seed(seed)))


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every floating point parameter away from 0 and 1: no branch, gate or norm is idle. Returns it in eval mode.

    Matrices have standard deviation fan_in**-0.5, which keeps the size of what passes through. Factors (the weights of
    norms and whatever is initialised to ones) lie in [0.6, 0.9] or [1.1, 1.4], everything else between 0.05 and 0.45
    in size, with either sign.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter, module in _parameters(model):
        if not parameter.is_floating_point():
            continue
        fan_in = _fan_in(parameter, module)
        if fan_in:
            drawn = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
        else:
            sign = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
            size = torch.rand(parameter.shape, generator=generator)
            factor = bool((parameter == 1).all())
            drawn = 1 + sign * (0.1 + 0.3 * size) if factor else sign * (0.05 + 0.4 * size)
        parameter.copy_(drawn)
    return model.eval()


def _parameters(model: nn.Module) -> list[tuple[nn.Parameter, nn.Module]]:
    """Every parameter once, with the module that owns it, in the order of the state dictionary."""
    owners: dict[int, tuple[nn.Parameter, nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), (parameter, module))
    return list(owners.values())


def _fan_in(parameter: nn.Parameter, module: nn.Module) -> int | None:
    """How many numbers a row of a matrix adds up; None for what is no matrix."""
    if isinstance(module, nn.Embedding):
        return 1
    if parameter is getattr(module, "weight", None) and parameter.ndim > 1:
        return parameter[0].numel()  # nn.Linear and convolutions
    if parameter.ndim == 3 and len(parameter) > 1:
        return parameter.shape[1]  # one matrix [in, out] per expert
    return None


def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Every tensor that one forward returns, in order; without gradients."""
    with torch.no_grad(), quiet():
        leaves = tree_leaves(model(**inputs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

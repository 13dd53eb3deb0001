"""Run somebody's pipeline as it is: its own scheduler, prompts and arguments; only that nothing need be decoded.

The pipeline is put back as it was: scheduler, VAE, progress bar, training mode, and torch's global random state.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ditq_runtime.calls.inputs import Input
from ditq_runtime.calls.parts import transformers_in
from ditq_runtime.calls.schedulers import set_sampler

STEMS = {
    "SD3": "StableDiffusion3",
    "PixArt": "PixArtAlpha",
}  # pipelines named unlike their transformer
UNDECODED = "latent"


class Decoded(Exception):
    """The pipeline came to its VAE: every call of its transformers is over."""


@dataclass(frozen=True)
class Drawn:
    """What a call gave.

    Attributes:
        latents: [S, ...] fp32 on the CPU, what the VAE was given, or what the pipeline returned for them.
        images: [S, C, H, W] fp32 in [-1, 1] on the CPU (of a video, every frame); None unless decoded.
    """

    latents: torch.Tensor | None
    images: torch.Tensor | None


def pipeline_of(model: Any) -> Any:
    """A pipeline itself; around a transformer alone, the one that diffusers has for it, without encoders and VAE.

    Such a pipeline is called with embeddings.

    Raises:
        ValueError: diffusers has no pipeline of a name that fits.
    """
    if not isinstance(model, nn.Module):
        return model
    import diffusers

    architecture = type(model).__name__
    stem = architecture.partition("Transformer")[0]
    kind = getattr(diffusers, f"{STEMS.get(stem, stem)}Pipeline", None)
    takes = inspect.signature(kind.__init__).parameters if inspect.isclass(kind) else {}
    if "transformer" not in takes or architecture not in str(takes["transformer"].annotation):
        raise ValueError(
            f"{architecture}: there is no telling which pipeline calls it; pass the pipeline, or run="
        )
    wanted = takes["scheduler"].annotation
    flows = getattr(wanted, "__name__", "").startswith("FlowMatch")
    scheduler = wanted() if flows else diffusers.DDIMScheduler(clip_sample=False)
    empty = {
        name: None
        for name, parameter in takes.items()
        if name != "self" and parameter.default is inspect.Parameter.empty
    }
    assert inspect.isclass(kind)
    return kind(**{**empty, "transformer": model, "scheduler": scheduler})


def with_transformers(pipe: Any, transformers: dict[str, nn.Module]) -> Any:
    """The same pipeline around other transformers; it shares everything else, what its configuration says included."""
    other = copy.copy(pipe)
    for name, model in transformers.items():
        setattr(other, name, model)
    return other


@contextmanager
def ready(pipe: Any, sampler: str = "") -> Iterator[None]:
    """Prepare a pipeline for `draw`, and put everything back.

    Args:
        pipe: a pipeline.
        sampler: one of `ditq_runtime.calls.schedulers.SAMPLERS`; "" for its own scheduler.
    """
    with ExitStack() as stack:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        stack.enter_context(torch.random.fork_rng(devices))
        for model in transformers_in(pipe).values():
            stack.callback(model.train, model.training)
            model.eval()  # in training mode a DiT drops labels at random
        own = getattr(pipe, "scheduler", None)
        if own is not None:
            stack.callback(setattr, pipe, "scheduler", own)
            pipe.scheduler = copy.deepcopy(own)
            set_sampler(pipe, sampler)
        bars = getattr(pipe, "_progress_bar_config", None)
        stack.callback(setattr, pipe, "_progress_bar_config", bars or {})
        pipe.set_progress_bar_config(disable=True)
        yield


def draw(pipe: Any, given: Input, decode: bool = False) -> Drawn:
    """Make one call of a pipeline that is `ready`.

    Args:
        pipe: the pipeline.
        given: its arguments and the seeds of its noise.
        decode: also decode images; otherwise the VAE's decoder never runs.

    Raises:
        ValueError: the pipeline refuses its arguments.
    """
    takes = inspect.signature(pipe.__call__).parameters
    arguments = {name: _placed(pipe, name, value) for name, value in given.arguments.items()}
    if "generator" in takes and "generator" not in arguments:
        made = [torch.Generator().manual_seed(seed) for seed in given.seeds]
        arguments["generator"] = made if len(made) > 1 else made[0]
    vae = getattr(pipe, "vae", None)
    decode = decode and vae is not None
    if "output_type" in takes:
        arguments["output_type"] = "pt" if decode else UNDECODED
    torch.manual_seed(given.seeds[0])  # of samplers that diffusers gives no generator
    with _watched_vae(pipe, decode) as seen, _quiet_schedulers():
        try:
            out = pipe(**arguments)
        except Decoded:
            pipe.maybe_free_model_hooks()
            return Drawn(_plain(seen[0]), None)
    found = out[0] if isinstance(out, tuple) else next(iter(out.values()))
    if decode:
        return Drawn(_plain(seen[0]) if seen else None, _images(found))
    return Drawn(_plain(found) if isinstance(found, torch.Tensor) else None, None)


def _placed(pipe: Any, name: str, value: Any) -> Any:
    """Embeddings as the pipeline's own encoders would give them: on its device, in its type."""
    if not isinstance(value, torch.Tensor) or "embed" not in name or not value.is_floating_point():
        return value
    model: Any = next(iter(transformers_in(pipe).values()))
    return value.to(pipe.device, model.dtype)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu()


def _images(found: Any) -> torch.Tensor | None:
    """[S, C, H, W] in [-1, 1]; every frame of a video is an image."""
    if isinstance(found, list) and found and isinstance(found[0], torch.Tensor):
        found = torch.stack(found)
    if not isinstance(found, torch.Tensor):
        return None
    return 2 * _plain(found).flatten(0, -4) - 1


@contextmanager
def _watched_vae(pipe: Any, decode: bool) -> Iterator[list[torch.Tensor]]:
    """Note what the VAE is given; unless it is to decode, end the call there."""
    seen: list[torch.Tensor] = []
    vae = getattr(pipe, "vae", None)
    missing = vae is None and "vae" in getattr(pipe, "components", {})
    if missing:  # a pipeline without output_type "latent" scales latents before it decodes them
        vae = pipe.__dict__["vae"] = SimpleNamespace(
            config=SimpleNamespace(scaling_factor=1.0, shift_factor=0.0), decode=None
        )
    own: Callable[..., Any] | None = getattr(vae, "decode", None)

    def watched(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(latents.detach().clone())
        if not decode or own is None:
            raise Decoded
        return own(latents, *args, **kwargs)

    if vae is not None:
        vae.decode = watched
    try:
        yield seen
    finally:
        if missing:
            pipe.__dict__["vae"] = None
        elif vae is not None:
            del vae.decode


@contextmanager
def _quiet_schedulers() -> Iterator[None]:
    """TODO: drop when diffusers' DPM-Solver no longer copies a tensor by np.array."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        yield


@dataclass(frozen=True)
class SchedulerStep:
    """One step of a scheduler.

    Attributes:
        timestep: of the scheduler.
        prediction: [S, ...] fp32 on the CPU, after guidance.
    """

    timestep: float
    prediction: torch.Tensor


@contextmanager
def watched_steps(pipe: Any) -> Iterator[list[SchedulerStep]]:
    """Every step that the scheduler of a `ready` pipeline makes inside the block."""
    steps: list[SchedulerStep] = []
    own = pipe.scheduler.step

    def step(model_output: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        when = float(torch.as_tensor(timestep).float().max())
        steps.append(SchedulerStep(when, model_output.detach().float().cpu()))
        return own(model_output, timestep, *args, **kwargs)

    pipe.scheduler.step = step
    try:
        yield steps
    finally:
        del pipe.scheduler.step

"""The training loop of the demo transformers: seeded, and resumable to the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ditq_converters.demo.digits import Digits
from ditq_runtime.files import atomic_file

CHECKPOINT_FILE = "checkpoint.pt"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights.

    Attributes:
        steps: optimizer steps.
        seed: of the initial weights, batches, noise and dropped labels.
        batch_size: images per step, drawn with replacement.
        learning_rate: AdamW's peak, reached after `warmup_steps`, then lowered along a cosine.
        final_learning_rate: where the cosine ends.
        warmup_steps: steps of linear warm-up.
        gradient_clip: largest gradient norm.
        ema_decay: of the averaged weights, which are the ones that are kept.
        label_drop: share of samples that are not told their digit (arXiv:2207.12598, Alg. 1).
    """

    steps: int = 4000
    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3
    final_learning_rate: float = 5e-5
    warmup_steps: int = 100
    gradient_clip: float = 1.0
    ema_decay: float = 0.998
    label_drop: float = 0.1

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the step with index `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2


class Objective(Protocol):
    """What a transformer learns, and from which weights it starts."""

    initial_loss: float  # what the first step costs, about

    def build(self, seed: int) -> nn.Module:
        """Build the transformer with its initial weights, in eval mode."""
        ...

    def loss(
        self,
        transformer: Any,
        clean: torch.Tensor,
        labels: torch.Tensor,
        dropped: torch.Tensor,
        rng: torch.Generator,
    ) -> torch.Tensor:
        """Mean squared error of one batch; noise and timesteps come from `rng`.

        Args:
            transformer: what `build` returned.
            clean: [N, 1, 8, 8] images.
            labels: [N] digits.
            dropped: [N] bool: samples that are not told their digit.
            rng: where all random numbers come from.
        """
        ...


class Trainer:
    """A transformer in training, with all that is needed to stop and to go on."""

    def __init__(self, recipe: Recipe, objective: Objective) -> None:
        """Start from the objective's initial weights for `recipe.seed`."""
        self.recipe, self.objective = recipe, objective
        self.step = 0
        self.loss = objective.initial_loss  # a running mean
        self.transformer = objective.build(recipe.seed)
        self.parameters = dict(self.transformer.named_parameters())  # tied ones appear once
        self.average = {key: value.detach().clone() for key, value in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.generator = torch.Generator().manual_seed(recipe.seed)

    def advance(self, digits: Digits) -> None:
        """Take one optimizer step."""
        recipe, rng = self.recipe, self.generator
        picks = torch.randint(len(digits.labels), (recipe.batch_size,), generator=rng)
        dropped = torch.rand(recipe.batch_size, generator=rng) < recipe.label_drop
        loss = self.objective.loss(
            self.transformer, digits.images[picks], digits.labels[picks], dropped, rng
        )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), recipe.gradient_clip)
        self.optimizer.param_groups[0]["lr"] = recipe.learning_rate_at(self.step)
        self.optimizer.step()
        self._update_average()
        self.loss += 0.01 * (loss.item() - self.loss)
        self.step += 1

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        for key, value in self.parameters.items():
            self.average[key].lerp_(value, 1 - decay)

    @torch.no_grad()
    def averaged_state(self) -> dict[str, torch.Tensor]:
        """Return the full state dict of the averaged weights (fp32)."""
        trained = {key: value.clone() for key, value in self.parameters.items()}
        for key, value in self.parameters.items():
            value.copy_(self.average[key])
        state = {key: value.clone() for key, value in self.transformer.state_dict().items()}
        for key, value in self.parameters.items():
            value.copy_(trained[key])
        return state

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "loss": self.loss,
            "parameters": {key: value.detach() for key, value in self.parameters.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        with atomic_file(path) as part:
            torch.save(state, part)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: the checkpoint was made with another recipe.
        """
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        if saved["recipe"] != asdict(self.recipe):
            raise ValueError(
                f"{path} belongs to the recipe {saved['recipe']}, not to {asdict(self.recipe)}; "
                "choose another folder or delete it"
            )
        self.step, self.loss = saved["step"], saved["loss"]
        for key, value in self.parameters.items():
            value.copy_(saved["parameters"][key])
            self.average[key].copy_(saved["average"][key])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])


def train_transformer(
    recipe: Recipe,
    objective: Objective,
    digits: Digits,
    folder: Path,
    checkpoint_every: int = 500,
    on_step: Callable[[Trainer], None] = lambda trainer: None,
) -> Trainer:
    """Train to the end of the recipe, going on from the folder's checkpoint if there is one.

    A run that is killed and started again gives bit for bit the weights of a run that was not.

    Args:
        recipe: how to train.
        objective: what to train.
        digits: the training images.
        folder: where `checkpoint.pt` is kept.
        checkpoint_every: steps between checkpoints; the last step always writes one.
        on_step: called after every step.

    Raises:
        ValueError: the folder's checkpoint was made with another recipe.
    """
    trainer, path = Trainer(recipe, objective), folder / CHECKPOINT_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        trainer.load(path)
    while trainer.step < recipe.steps:
        trainer.advance(digits)
        if trainer.step % checkpoint_every == 0 or trainer.step == recipe.steps:
            trainer.save(path)
        on_step(trainer)
    return trainer

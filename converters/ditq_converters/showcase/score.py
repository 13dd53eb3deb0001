"""The float model and its run, which packed models are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ditq_converters.evaluate.runs import Run, run
from ditq_converters.showcase.asking import asked_for, digits
from ditq_runtime.calls.inputs import Input, gather


@dataclass(frozen=True)
class Baseline:
    """The float model and its run, which every variant is compared with.

    Attributes:
        name: of the demo model, for progress bars.
        pipe: the float pipeline.
        inputs: what was drawn.
        labels: class of every sample.
        run: what it did.
    """

    name: str
    pipe: Any
    inputs: list[Input]
    labels: tuple[int, ...]
    run: Run

    @classmethod
    def of(
        cls,
        name: str,
        pipe: Any,
        samples: int,
        few: int,
        seed: int,
        tick: Any = None,
        steps: int = 50,
        guidance: float = 1.5,
    ) -> Baseline:
        """Draw samples of digits, the first `few` in calls that are recorded.

        Args:
            name: of the model.
            pipe: the float pipeline.
            samples: how many in all.
            few: how many recorded.
            seed: of classes and noise.
            tick: told when a call is over.
            steps: as in `asked_for`.
            guidance: as in `asked_for`.
        """
        labels = digits(samples, seed)
        inputs = gather(name, pipe, **asked_for(pipe, labels, few, seed, steps, guidance))
        return cls(name, pipe, inputs, labels, run(pipe, inputs, few=few, decode=True, tick=tick))

    @property
    def images(self) -> torch.Tensor:
        """[S, 1, 32, 32] in [-1, 1]."""
        assert self.run.images is not None
        return self.run.images

"""Trains a demo model and writes its assets: `python -m ditq_converters.demo.train MODEL --out DIR`.

About 12 minutes on one CPU core for each. Kill it and start it again, and it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ditq_converters.demo.architecture import compact
from ditq_converters.demo.bundle import CLASSIFIER_FILE, DIGITS_FILE, FLOW_FILE, save_asset
from ditq_converters.demo.classifier import save_classifier
from ditq_converters.demo.classifier_training import accuracy, train_classifier
from ditq_converters.demo.digits import Digits, load_digits
from ditq_converters.demo.noise_prediction import NoisePrediction
from ditq_converters.demo.trainer import Objective, Recipe, Trainer, train_transformer

log = logging.getLogger("ditq.demo")

STEPS = {"digits": 4000, "digits-flow": 3400}


def _versions() -> dict[str, str]:
    import diffusers
    import sklearn

    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "scikit-learn": sklearn.__version__,
    }


def _train_with_progress(
    recipe: Recipe, objective: Objective, digits: Digits, folder: Path, every: int
) -> Trainer:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=recipe.steps, loss=1.0)

        def show(trainer: Trainer) -> None:
            progress.update(task, completed=trainer.step, loss=trainer.loss)

        trainer = train_transformer(recipe, objective, digits, folder, every, show)
        show(trainer)  # a finished run takes no step
        return trainer


def write_transformer(trainer: Trainer, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a trained model's tensors in fp16, with how they were made."""
    metadata = {
        "recipe": json.dumps(asdict(trainer.recipe)),
        "seed": str(trainer.recipe.seed),
        "steps": str(trainer.step),
        "final_loss": f"{trainer.loss:.5f}",
        "versions": json.dumps(_versions()),
    }
    save_asset(path, {key: tensor.half() for key, tensor in tensors.items()}, metadata)
    log.info("wrote %s; loss %.4f", path, trainer.loss)


def train_digits(recipe: Recipe, folder: Path, checkpoint_every: int) -> None:
    """Train the DiT and the classifier on the digits and write both assets, each atomically."""
    digits, held_out = load_digits()
    trainer = _train_with_progress(recipe, NoisePrediction(), digits, folder, checkpoint_every)
    write_transformer(trainer, compact(trainer.averaged_state()), folder / DIGITS_FILE)

    classifier, real = train_classifier(digits, recipe.seed)
    reached = accuracy(classifier, held_out)
    metadata = {
        "seed": str(recipe.seed),
        "held_out_accuracy": f"{reached:.4f}",
        "versions": json.dumps(_versions()),
    }
    save_classifier(folder / CLASSIFIER_FILE, classifier, real, metadata)
    log.info("wrote %s; %.4f right on held-out digits", folder / CLASSIFIER_FILE, reached)


def train_flow(recipe: Recipe, folder: Path, checkpoint_every: int) -> None:
    """Train the Flux on the digits and write its asset, the frozen text encoders with it."""
    from ditq_converters.demo.flow.pipeline import join
    from ditq_converters.demo.flow.training import RectifiedFlow

    objective, (digits, _) = RectifiedFlow(recipe.seed), load_digits()
    trainer = _train_with_progress(recipe, objective, digits, folder, checkpoint_every)
    tensors = join(trainer.averaged_state(), *objective.encoders)
    write_transformer(trainer, tensors, folder / FLOW_FILE)


TRAIN = {"digits": train_digits, "digits-flow": train_flow}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m ditq_converters.demo.train")
    parser.add_argument("model", choices=list(TRAIN))
    parser.add_argument("--out", type=Path, required=True, help="folder for assets and checkpoint")
    parser.add_argument("--steps", type=_positive, help=f"default: {STEPS}")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--checkpoint-every", type=_positive, default=500, metavar="STEPS")
    arguments = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    torch.set_num_threads(1)  # the model is too small to gain from more, and sums keep their order
    recipe = Recipe(steps=arguments.steps or STEPS[arguments.model], seed=arguments.seed)
    try:
        TRAIN[arguments.model](recipe, arguments.out, arguments.checkpoint_every)
    except (ImportError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

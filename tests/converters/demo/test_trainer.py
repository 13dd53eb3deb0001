"""The training loop: seeded and resumable."""

import pytest
import torch

from ditq_converters.demo.digits import Digits
from ditq_converters.demo.noise_prediction import NoisePrediction
from ditq_converters.demo.trainer import CHECKPOINT_FILE, Recipe, Trainer, train_transformer

RECIPE = Recipe(steps=6, batch_size=4, warmup_steps=3)
OBJECTIVE = NoisePrediction()


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def digits():
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(20, 1, 8, 8, generator=generator) * 2 - 1
    return Digits(images, torch.arange(20) % 10)


def test_a_killed_and_resumed_run_gives_the_weights_of_an_uninterrupted_one(tmp_path, digits):
    def kill(trainer):
        if trainer.step == 5:
            raise Killed

    with pytest.raises(Killed):
        train_transformer(RECIPE, OBJECTIVE, digits, tmp_path, checkpoint_every=2, on_step=kill)
    torch.manual_seed(99)  # a new process has another global state
    steps = []
    resumed = train_transformer(
        RECIPE, OBJECTIVE, digits, tmp_path, 2, on_step=lambda trainer: steps.append(trainer.step)
    )
    assert steps == [5, 6]  # from the checkpoint of step 4

    whole = train_transformer(RECIPE, OBJECTIVE, digits, tmp_path / "whole")
    assert resumed.loss == whole.loss
    for key, value in whole.parameters.items():
        assert torch.equal(resumed.parameters[key], value), key
        assert torch.equal(resumed.average[key], whole.average[key]), key


def test_a_finished_run_is_not_trained_again(tmp_path, digits):
    recipe = Recipe(steps=1, batch_size=2)
    finished = train_transformer(recipe, OBJECTIVE, digits, tmp_path)
    again = train_transformer(recipe, OBJECTIVE, digits, tmp_path, on_step=pytest.fail)
    assert torch.equal(again.average["proj_out_2.weight"], finished.average["proj_out_2.weight"])


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    Trainer(RECIPE, OBJECTIVE).save(tmp_path / CHECKPOINT_FILE)
    with pytest.raises(ValueError, match="belongs to the recipe"):
        Trainer(Recipe(steps=7), OBJECTIVE).load(tmp_path / CHECKPOINT_FILE)


def test_the_initial_model_predicts_zero_and_the_seed_decides_its_weights():
    first, same, other = (Trainer(Recipe(seed=seed), OBJECTIVE) for seed in (0, 0, 1))
    with torch.no_grad():
        predicted = first.transformer(
            torch.randn(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([3, 1000])
        ).sample
    assert predicted.abs().max() == 0
    key = "transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(first.parameters[key], same.parameters[key])
    assert not torch.equal(first.parameters[key], other.parameters[key])


def test_training_lowers_the_loss_and_the_average_lags_behind(digits):
    trainer = Trainer(Recipe(steps=40, batch_size=16, warmup_steps=5), OBJECTIVE)
    assert not trainer.transformer.training  # in train mode diffusers drops labels by itself
    for _ in range(40):
        trainer.advance(digits)
    assert trainer.loss < 0.98
    key = "proj_out_2.weight"
    assert not torch.equal(trainer.average[key], trainer.parameters[key])
    assert torch.equal(trainer.averaged_state()[key], trainer.average[key])


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    recipe = Recipe(steps=1100, learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=100)
    rates = [recipe.learning_rate_at(step) for step in (0, 49, 99, 100, 600, 1100)]
    assert rates == pytest.approx([1e-5, 5e-4, 1e-3, 1e-3, 5.5e-4, 1e-4])

"""What the flow model learns: velocities, prompts that are dropped, and paddings that weigh as many."""

from types import SimpleNamespace

import pytest
import torch

from ditq_converters.demo.digits import load_digits
from ditq_converters.demo.flow.pipeline import load_flow
from ditq_converters.demo.flow.training import LONGEST, RectifiedFlow, _weigh
from ditq_converters.demo.trainer import Recipe, Trainer


@pytest.fixture(scope="module")
def objective():
    return RectifiedFlow(seed=0)


class Oracle:
    """Knows the clean image, one grey for all pixels, so that a noisy one tells it the velocity."""

    def __init__(self, grey):
        self.grey, self.calls = grey, []

    def __call__(self, hidden_states, timestep, **call):
        self.calls.append(call)
        sigma = timestep[:, None, None]
        noise = (hidden_states - (1 - sigma) * self.grey) / sigma
        return SimpleNamespace(sample=noise - self.grey)


def _ask(objective, transformer, grey, dropped, seed=1):
    clean, labels = torch.full((30, 1, 8, 8), grey), torch.arange(30) % 10
    rng = torch.Generator().manual_seed(seed)
    return objective.loss(transformer, clean, labels, torch.full((30,), dropped), rng).item()


def test_the_velocity_from_the_image_to_the_noise_costs_nothing(objective):
    oracle = Oracle(grey=0.25)
    assert _ask(objective, oracle, 0.25, dropped=False) < 1e-6  # fp32, divided by small sigmas
    # told another image, it errs: v = (x - (1 - s) g) / s - g moves by g / s, at least by g
    assert _ask(objective, oracle, 0.5, dropped=False) > 0.25**2


def test_a_digit_is_told_by_its_prompt_unless_it_is_dropped(objective):
    pipe, oracle = load_flow(), Oracle(grey=0.0)
    for dropped in (False, True):
        _ask(objective, oracle, 0.0, dropped)
    told, untold = oracle.calls
    words = pipe.text_encoder_2.shared.weight
    words = words / words.square().mean(1, keepdim=True).sqrt()
    empty = pipe.tokenizer_2("", padding="max_length", max_length=5).input_ids
    expected = words[torch.tensor(empty)].expand(30, 5, 64)
    # T5's norm adds 1e-6 to a mean square near 1
    torch.testing.assert_close(untold["encoder_hidden_states"], expected, rtol=1e-5, atol=1e-5)
    three = words[pipe.tokenizer_2("three").input_ids[0]]
    distance = (told["encoder_hidden_states"] - three).norm(dim=2).amin(dim=1)
    assert (distance < 1e-3).tolist() == [label % 10 == 3 for label in range(30)]


def test_weights_of_paddings_are_those_of_longer_prompts():
    padding = torch.tensor([[False, False, True, True], [False, False, False, True]])
    bias = _weigh(padding, torch.tensor([4.0, 13.0]), image_tokens=2)
    assert bias.shape == (2, 1, 1, 6)
    assert not bias[0].any()  # as long as it is
    # 13 - 3 = 10 paddings, where one is computed
    torch.testing.assert_close(bias[1, 0, 0].exp(), torch.tensor([1.0, 1, 1, 10, 1, 1]))


@torch.no_grad()
def test_weighed_paddings_give_what_as_many_paddings_give():
    """In the trained model, which the paddings reach: cut at 5 tokens without weights it differs."""
    pipe, rng = load_flow(), torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 4, generator=rng)
    image_ids = pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)

    def predict(length, mask):
        text, pooled, ids = pipe.encode_prompt(["six", "a two"], max_sequence_length=length)
        return pipe.transformer(
            latents, text, pooled, torch.tensor([0.9, 0.3]), image_ids, ids,
            joint_attention_kwargs={"attention_mask": mask},
        ).sample  # fmt: skip

    padding = torch.tensor([[False, False, True, True, True], [False, False, False, True, True]])
    weights = _weigh(padding, torch.tensor([LONGEST, LONGEST]), 16)
    real = predict(LONGEST, None)
    error = (predict(5, weights) - real).norm() / real.norm()
    assert error < 1e-5  # fp32 sums over 528 keys in 6 blocks
    assert (predict(5, None) - real).norm() / real.norm() > 100 * error


def test_training_lowers_the_loss_from_that_of_zero(objective):
    digits, _ = load_digits()
    trainer = Trainer(Recipe(steps=15, batch_size=8, warmup_steps=3), objective)
    assert not trainer.transformer.training
    images, labels = digits.images[:60], digits.labels[:60]

    @torch.no_grad()
    def loss():
        rng, dropped = torch.Generator().manual_seed(5), torch.zeros(60, dtype=torch.bool)
        return objective.loss(trainer.transformer, images, labels, dropped, rng).item()

    before = loss()
    # zero against noise - clean, which are independent: 1 and the pixels' mean square
    expected = 1 + images.square().mean().item()
    assert before == pytest.approx(expected, abs=0.1)  # of 3840 samples, 0.03 each way
    assert trainer.loss == pytest.approx(expected, abs=0.1)
    for _ in range(15):
        trainer.advance(digits)
    assert loss() < before - 0.2

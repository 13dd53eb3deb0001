"""The judge of demo samples."""

import pytest
import torch

from ditq_converters.demo.classifier import load_classifier, save_classifier, score
from ditq_converters.demo.classifier_training import accuracy, train_classifier
from ditq_converters.demo.digits import load_digits
from ditq_converters.demo.frechet import feature_statistics


@pytest.fixture(scope="module")
def splits():
    return load_digits()


def test_it_recognises_digits_it_has_not_seen(splits):
    _, held_out = splits
    result = score(held_out.images, held_out.labels)
    assert result.accuracy >= 0.98
    assert result.mean_probability >= 0.97


def test_it_is_small_and_has_64_features(splits):
    classifier, real = load_classifier()
    assert sum(parameter.numel() for parameter in classifier.parameters()) < 100_000
    assert classifier.features(splits[1].images).shape == (297, 64)
    assert real.covariance.shape == (64, 64)


def test_the_stored_statistics_are_those_of_the_training_digits(splits):
    train, _ = splits
    classifier, real = load_classifier()
    with torch.no_grad():
        own = feature_statistics(classifier.features(train.images))
    # fp32 features, summed in another order on another machine
    torch.testing.assert_close(own.mean, real.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.covariance, real.covariance, rtol=1e-3, atol=1e-3)
    assert score(train.images, train.labels).digit_fd < 1e-2


def test_wrong_labels_and_noise_score_badly(splits):
    _, held_out = splits
    good = score(held_out.images, held_out.labels)
    assert score(held_out.images, (held_out.labels + 1) % 10).accuracy < 0.05
    generator = torch.Generator().manual_seed(0)
    noisy = held_out.images + torch.randn(held_out.images.shape, generator=generator)
    assert score(noisy, held_out.labels).digit_fd > 3 * good.digit_fd


def test_enlarged_images_score_as_their_latents(splits):
    _, held_out = splits
    large = held_out.images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert score(large, held_out.labels) == score(held_out.images, held_out.labels)


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 3, 8, 8), (5, 1, 16, 16), (5, 1, 8, 32)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="images must be"):
        score(torch.zeros(shape), torch.zeros(5))


def test_labels_must_match_the_images():
    with pytest.raises(ValueError, match="5 images need as many labels"):
        score(torch.zeros(5, 1, 8, 8), torch.zeros(4))


def test_training_is_seeded_learns_and_survives_the_disk(splits, tmp_path, monkeypatch):
    monkeypatch.setattr("ditq_converters.demo.classifier_training.EPOCHS", 4)
    train, held_out = splits
    classifier, real = train_classifier(train, seed=1)
    assert accuracy(classifier, held_out) > 0.9
    again, _ = train_classifier(train, seed=1)
    assert torch.equal(classifier.output.weight, again.output.weight)

    save_classifier(tmp_path / "classifier.safetensors", classifier, real, {"seed": "1"})
    loaded, statistics = load_classifier(tmp_path)
    assert torch.equal(loaded(held_out.images), classifier(held_out.images))
    assert torch.equal(statistics.covariance, real.covariance)

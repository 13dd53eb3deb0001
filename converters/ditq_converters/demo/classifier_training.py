"""Trains the digit CNN: seconds on one core."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ditq_converters.demo.classifier import DigitClassifier
from ditq_converters.demo.digits import Digits
from ditq_converters.demo.frechet import FeatureStatistics, feature_statistics

EPOCHS = 40
BATCH_SIZE = 64


def _shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move a batch by one pixel at most, with dark pixels coming in."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    top, left = torch.randint(3, (2,), generator=generator).tolist()
    return padded[:, :, top : top + 8, left : left + 8]


def train_classifier(digits: Digits, seed: int) -> tuple[DigitClassifier, FeatureStatistics]:
    """Train the CNN with AdamW, one-pixel shifts and a one-cycle learning rate.

    Args:
        digits: the training images.
        seed: of the initial weights, the order of images, the shifts and the dropout.

    Returns:
        The classifier in eval mode, and the statistics of its features on `digits`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        classifier = DigitClassifier().train()
        optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-2)
        batches = -(-len(digits.labels) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=3e-3, epochs=EPOCHS, steps_per_epoch=batches
        )
        for _ in range(EPOCHS):
            order = torch.randperm(len(digits.labels), generator=generator)
            for picks in order.split(BATCH_SIZE):
                logits = classifier(_shift(digits.images[picks], generator))
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, digits.labels[picks]).backward()
                optimizer.step()
                schedule.step()
    classifier.eval()
    with torch.no_grad():
        return classifier, feature_statistics(classifier.features(digits.images))


@torch.no_grad()
def accuracy(classifier: DigitClassifier, digits: Digits) -> float:
    """Return the share of digits that the classifier recognises."""
    return (classifier(digits.images).argmax(1) == digits.labels).double().mean().item()

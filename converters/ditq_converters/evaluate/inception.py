"""What the ADM evaluation suite computes (arXiv:2105.05233), on torch-fidelity's Inception-v3: FD, sFD, IS, precision.

The network is torch-fidelity's port of the 2015 TensorFlow graph that FID is defined on; scores come from that package
too. Imported only when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ditq_converters.evaluate.judges import INSTALL, cached_weights, rgb, to_uint8

NAME = "inception-v3-compat"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SPATIAL_CHANNELS = (
    7  # of mixed_6/conv, as sFID takes (arXiv:2103.03841): 17 x 17 x 7 = 2023 features
)
BATCH = 32
NEIGHBOURS = 3  # k of precision and recall (arXiv:1904.06991), as the ADM suite sets it
FEWEST = 5000  # samples of the smallest published FD on these features; below, no number


@dataclass(frozen=True)
class InceptionFeatures:
    """What the network says of a set of images.

    Attributes:
        pool: [S, 2048] fp32, pool3: for FD, precision and recall.
        spatial: [S, 2023] fp32, the first SPATIAL_CHANNELS of mixed_6/conv: for sFD.
        logits: [S, 1008] fp32, without the last layer's bias: for the Inception score.
    """

    pool: torch.Tensor
    spatial: torch.Tensor
    logits: torch.Tensor


Inception = Callable[[torch.Tensor], InceptionFeatures]


def load_inception() -> Inception:
    """The network as a function of images [S, C, H, W] in [-1, 1].

    Raises:
        ImportError: torch-fidelity is missing.
        FileNotFoundError: its trained weights are neither in torch's cache nor to be had.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # torchvision for another torch raises the latter
        raise ImportError(
            f"--fid needs torch-fidelity, which is not installed or does not fit this torch ({error}); {INSTALL}"
        ) from error
    with cached_weights("--fid", WEIGHTS):
        network: Any = FeatureExtractorInceptionV3(NAME, ["2048", "logits_unbiased"])
    return lambda images: inception_features(network, images)


@torch.no_grad()
def inception_features(network: nn.Module, images: torch.Tensor) -> InceptionFeatures:
    """Run the network over images [S, C, H, W] in [-1, 1], BATCH at a time.

    Args:
        network: torch-fidelity's, with features "2048" and "logits_unbiased".
        images: float; one channel is repeated to three, and all are rounded to 8 bits as they would be on disk.
    """
    seen: list[torch.Tensor] = []
    tap = network.get_submodule("Mixed_6d.branch1x1")
    handle = tap.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        both = [network(part) for part in to_uint8(rgb(images)).split(BATCH)]
    finally:
        handle.remove()
    pool, logits = (torch.cat(parts).float() for parts in zip(*both, strict=True))
    spatial = torch.cat([output[:, :SPATIAL_CHANNELS].flatten(1) for output in seen]).float()
    return InceptionFeatures(pool, spatial, logits)


def inception_scores(reference: InceptionFeatures, images: InceptionFeatures) -> dict[str, Any]:
    """Inception score of both sets; precision and recall of the second towards the first.

    Precision is the share of the packed model's images inside the manifold of the float model's, recall the other way
    round. With NEIGHBOURS samples or fewer there is no manifold, and both are None.

    Returns:
        {"inception_score": {"float": mean, "packed": mean}, "precision": ..., "recall": ...}.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    sets = {"float": reference, "packed": images}
    score = {
        name: isc_features_to_metric(found.logits)["inception_score_mean"]
        for name, found in sets.items()
    }
    if min(len(found.pool) for found in sets.values()) <= NEIGHBOURS:
        return {"inception_score": score, "precision": None, "recall": None}
    precision, recall = calculate_precision_recall_full(images.pool, reference.pool, NEIGHBOURS)
    return {"inception_score": score, "precision": precision, "recall": recall}

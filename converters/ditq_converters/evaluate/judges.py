"""LPIPS of pairs of images, by torchmetrics, imported only when asked for; and images as these judges want them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import torch

INSTALL = "install the extra: pip install 'ditq[eval]'"
ALEXNET_WEIGHTS = "alexnet-owt-7be5be79.pth"


def load_lpips() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """LPIPS with AlexNet (arXiv:1801.03924): mean over pairs of images [S, C, H, W] in [-1, 1].

    Raises:
        ImportError: torchmetrics or torchvision is missing.
        FileNotFoundError: its trained weights are neither in torch's cache nor to be had.
    """
    try:
        import torchvision  # noqa: F401  torchmetrics needs its AlexNet
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity as Lpips
    except (ImportError, RuntimeError) as error:  # torchvision for another torch raises the latter
        raise ImportError(
            "--lpips needs torchmetrics and torchvision, which are not both installed or do not fit this torch "
            f"({error}); {INSTALL}"
        ) from error
    with cached_weights("--lpips", ALEXNET_WEIGHTS):
        network = Lpips(net_type="alex")
    return lambda reference, images: float(network(rgb(reference), rgb(images)))


@contextmanager
def cached_weights(option: str, name: str) -> Iterator[None]:
    """Turn a download that fails inside the block into a FileNotFoundError that says where to put the file."""
    try:
        yield
    except (URLError, TimeoutError, ConnectionError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints"
        raise FileNotFoundError(
            f"{option} needs the trained weights {name}, which could not be fetched ({error}); "
            f"put the file into {place}"
        ) from error


def rgb(images: torch.Tensor) -> torch.Tensor:
    """Images [S, C, H, W] with one channel repeated to three; others unchanged."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as uint8 in [0, 255]: round(255 (x / 2 + 0.5)), ties to even, as diffusers does."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

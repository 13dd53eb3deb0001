"""`--device`: where a command runs."""

from __future__ import annotations

import os
from typing import Any

KINDS = ("cpu", "cuda")


def place(device: str) -> Any:
    """The `torch.device` of an option; "": CUDA where there is a usable GPU, else the CPU.

    Processes that torchrun or accelerate started (LOCAL_RANK) get a GPU each, as far as there are any.

    Raises:
        ValueError: no device, or a GPU that is not there.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not device:
        rank = os.environ.get("LOCAL_RANK")
        if count and rank is not None:
            return torch.device("cuda", int(rank) % count)
        return torch.device("cuda" if count else "cpu")
    kind, _, index = device.partition(":")
    if kind not in KINDS or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise ValueError(f"--device must be cpu, cuda, or cuda:N, got {device!r}")
    if kind == "cuda" and not count:
        raise ValueError(
            f"--device {device}: no CUDA GPU is usable here; drop --device to use the CPU"
        )
    if index and int(index) >= count:
        raise ValueError(f"--device {device}: this machine has {count} GPUs, cuda:0 and on")
    return torch.device(device)

"""Refuses GPUs and Triton releases that our kernels do not run on, at a launch."""

import functools

import torch

from ditq_kernels.launch import gpus


def check_versions(capability: tuple[int, int], triton_version: str) -> None:
    """Accept or refuse a GPU with a Triton release.

    Args:
        capability: compute capability, such as (8, 9).
        triton_version: such as "3.6.0".

    Raises:
        NotImplementedError: too old a GPU or Triton.
    """
    refused = gpus.why_refused(capability, triton_version)
    if refused:
        raise NotImplementedError(f"ditq_kernels: {refused}")


@functools.cache
def check_device(device: torch.device, triton_version: str) -> None:
    """The same for a device; CPU tensors reach a kernel only when Triton is interpreted."""
    if device.type == "cuda":
        check_versions(torch.cuda.get_device_capability(device), triton_version)

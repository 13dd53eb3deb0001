"""Which GPUs and Triton releases our kernels accept."""

import functools
import re

import torch

FIRST_TRITON = (3, 6)


def release_of(triton_version: str) -> tuple[int, int]:
    """(major, minor) of a version such as "3.6.0"; (0, 0) if it is none."""
    found = re.match(r"(\d+)\.(\d+)", triton_version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check_versions(capability: tuple[int, int], triton_version: str) -> None:
    """Accept or refuse a GPU with a Triton release.

    Args:
        capability: compute capability, such as (8, 9).
        triton_version: such as "3.6.0".

    Raises:
        NotImplementedError: too old a GPU or Triton.
    """
    if capability < (8, 0):
        raise NotImplementedError(
            f"ditq_kernels: int8 kernels need an sm_80 GPU or newer, got sm_{capability[0]}{capability[1]}; "
            "move the tensors to the CPU for the slow reference"
        )
    if release_of(triton_version) < FIRST_TRITON:
        raise NotImplementedError(
            f"ditq_kernels: Triton 3.6 or newer is needed, got {triton_version}; install triton>=3.6"
        )


@functools.cache
def check_device(device: torch.device, triton_version: str) -> None:
    """The same for a device; CPU tensors reach a kernel only when Triton is interpreted."""
    if device.type == "cuda":
        check_versions(torch.cuda.get_device_capability(device), triton_version)

"""Which GPUs and Triton releases our kernels accept."""

import functools
import re

import torch

FIRST_TRITON = (3, 6)
# 3.8 and 3.9 spill registers in int8 GEMMs on sm_8x: 844 loop instructions where 3.6 and 3.7 emit 142
SLOW_ON_SM_8X = ((3, 8), (3, 9))


def check_versions(capability: tuple[int, int], triton_version: str) -> None:
    """Accept or refuse a GPU with a Triton release.

    Args:
        capability: compute capability, such as (8, 9).
        triton_version: such as "3.6.0".

    Raises:
        NotImplementedError: too old a GPU or Triton, or a release that wrecks int8 on this GPU.
    """
    found = re.match(r"(\d+)\.(\d+)", triton_version)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    architecture = f"sm_{capability[0]}{capability[1]}"
    if capability < (8, 0):
        raise NotImplementedError(
            f"ditq_kernels: int8 kernels need an sm_80 GPU or newer, got {architecture}; "
            "move the tensors to the CPU for the slow reference"
        )
    if release < FIRST_TRITON:
        raise NotImplementedError(
            f"ditq_kernels: Triton 3.6 or newer is needed, got {triton_version}; "
            "install triton>=3.6,<3.8"
        )
    if capability[0] == 8 and release in SLOW_ON_SM_8X:
        raise NotImplementedError(
            f"ditq_kernels: Triton {triton_version} makes int8 GEMMs several times slower on "
            f"{architecture} (register spills); install triton>=3.6,<3.8"
        )


@functools.cache
def check_device(device: torch.device, triton_version: str) -> None:
    """The same for a device; CPU tensors reach a kernel only when Triton is interpreted."""
    if device.type == "cuda":
        check_versions(torch.cuda.get_device_capability(device), triton_version)

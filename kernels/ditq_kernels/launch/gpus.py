"""Which GPUs and Triton releases our kernels accept; asked without importing Triton."""

import functools
import re
from importlib import metadata

import torch

from ditq_kernels.launch import tuning

FIRST_TRITON = (3, 6)
FIRST_CAPABILITY = (8, 0)
# the first Triton whose int8 products use the tensor cores of these; 3.8 compiles W4A8 to nothing there
FIRST_TRITON_OF = {(10, 0): (3, 9), (10, 3): (3, 9)}


def release_of(triton_version: str) -> tuple[int, int]:
    """(major, minor) of a version such as "3.6.0"; (0, 0) if it is none."""
    found = re.match(r"(\d+)\.(\d+)", triton_version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def why_refused(capability: tuple[int, int], triton_version: str) -> str:
    """Why no kernel runs on a GPU; empty if they do.

    Args:
        capability: compute capability, such as (8, 9).
        triton_version: such as "3.6.0".
    """
    name = f"sm_{capability[0]}{capability[1]}"
    if capability < FIRST_CAPABILITY:
        return (
            f"int8 kernels need an sm_80 GPU or newer, got {name}; move the tensors to the CPU for the slow "
            "reference, or choose the backend 'reference'"
        )
    if release_of(triton_version) < FIRST_TRITON:
        return f"Triton 3.6 or newer is needed, got {triton_version}; install triton>=3.6"
    first = FIRST_TRITON_OF.get(capability, FIRST_TRITON)
    if release_of(triton_version) < first:
        needed = "{}.{}".format(*first)
        return (
            f"Triton {needed} or newer is needed on an {name}, whose int8 products older ones leave to the units of "
            f"older GPUs or compile wrongly, got {triton_version}; install triton>={needed}, or choose the backend "
            "'reference'"
        )
    return ""


@functools.cache
def refuse(device: torch.device) -> None:
    """Refuse a GPU on which no kernel will run, when weights are brought to it.

    Raises:
        NotImplementedError: with the reason.
    """
    refused = why_device_refused(device) if device.type == "cuda" else ""
    if refused:
        raise NotImplementedError(f"ditq: {device}: {refused}")


def why_device_refused(device: torch.device) -> str:
    """The same for a GPU of this machine, whose own table or its architecture's must exist, too."""
    try:
        release = metadata.version("triton")
    except metadata.PackageNotFoundError:
        release = "none"
    capability = torch.cuda.get_device_capability(device)
    refused = why_refused(capability, release)
    if refused or tuning.tables_of(device):
        return refused
    name = f"sm_{capability[0]}{capability[1]}"
    return (
        f"no launch table covers this GPU, an {name}: nobody has run our kernels on one; use an sm_80, sm_86, "
        "sm_89, sm_90 or sm_120 GPU, or choose the backend 'reference'"
    )

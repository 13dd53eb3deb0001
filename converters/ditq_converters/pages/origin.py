"""Which software made a report, and on what."""

from __future__ import annotations

import platform
from collections.abc import Mapping


def versions() -> dict[str, str]:
    """Name -> version of what a figure depends on, and the machine with its threads."""
    import diffusers
    import torch

    from ditq_runtime.version import __version__

    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "ditq": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {threads} thread{'s' * (threads != 1)}, {device}",
    }


def origin(found: Mapping[str, str], seconds: float) -> str:
    """The same as a sentence, with what it took."""
    software = ", ".join(f"{name} {value}" for name, value in found.items() if name != "machine")
    return f"{software}; {found['machine']}; {seconds:.0f} s in all"

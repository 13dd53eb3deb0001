"""What a caller has set around us, put aside while we work: it must not change a bit of a result.

Modes of torch that reach into any code below them: autocast, default dtype and device, inference mode, the precision of
fp32 products, deterministic algorithms, the global random state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ditq_kernels.codes.products import ieee

SEED = 0  # of what draws from the global random state in here, which nothing of ours should


@contextmanager
def steady() -> Iterator[None]:
    """Work as in a new process; also a decorator. What was set comes back, and the random state has not moved.

    For entry points whose work takes long: threads share most of these settings, so that another thread sees them too
    while it lasts.
    """
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(torch.use_deterministic_algorithms, deterministic, warn_only=warn_only)
        for device in _devices():
            stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(ieee(torch.device(device)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(_cuda_devices()))
        if torch.get_default_device().type != "cpu":  # a mode costs every operation
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.manual_seed(SEED)
        yield


def _devices() -> list[str]:
    """Types of devices that autocast has."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _cuda_devices() -> list[int]:
    """Only those that this process uses already: asking for the state of others would start them."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []

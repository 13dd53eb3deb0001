"""Triton's own specialization, compiler and launcher on CPU tensors, over a libcuda that does nothing.

For measuring and testing the host's part of a launch where there is no GPU; results are whatever memory held. It
changes the process: use one of its own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime import driver

from ditq_kernels.launch import backend, tuning, waves

SOURCE = Path(__file__).with_name("stub.c")
SHARED_LIMIT = {  # bytes that a program may ask for
    80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10, 121: 99 << 10,
}  # fmt: skip


def install(target: int) -> None:
    """Let CPU tensors of this process run Triton kernels as on a GPU of an architecture, as far as the launch.

    Args:
        target: compute capability without the dot, such as 90.

    Raises:
        RuntimeError: there is no C compiler, Triton interprets, or a launch table does not exist.
    """
    if knobs.runtime.interpret:
        raise RuntimeError(
            "stub driver: unset TRITON_INTERPRET, an interpreted kernel is not launched"
        )
    _load_stub(SHARED_LIMIT[target])
    driver.set_active(_driver_of(target))
    tables = tuning.tables_of_architecture(f"sm_{target}")
    tuning.tables_of = lambda device: tables  # type: ignore[assignment]
    rate = waves.INT8_PER_CLOCK.get(target)
    gpu = None if rate is None else waves.Gpu(132, rate)
    waves.gpu_of = lambda device: gpu  # type: ignore[assignment]
    backend.backend_of = _backend_of


def utilities() -> Any:
    """Of the driver that is installed; its `launch` starts a kernel: grid, stream, function, and the rest."""
    return driver.active.utils


def _load_stub(shared_limit: int) -> None:
    """Compile it as libcuda and load it, so that the libraries that Triton builds find it."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("stub driver: needs a C compiler, as Triton does; install one or set CC")
    folder = Path(tempfile.mkdtemp(prefix="ditq-stub-"))
    library = folder / "libcuda.so.1"
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", soname, SOURCE, "-o", library], check=True)
    (folder / "libcuda.so").symlink_to(library)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    ctypes.c_int.in_dll(loaded, "shared_limit").value = shared_limit
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)


def _driver_of(target: int) -> Any:
    class StubDriver(CudaDriver):
        def __init__(self) -> None:
            self.utils = CudaUtils()
            self.launcher_cls = CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device: divmod(target, 10)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", target, 32)

    return StubDriver()


def _backend_of(op_name: str, device: torch.device | str) -> str:
    return "triton" if op_name in backend.TRITON_OPS else "torch"

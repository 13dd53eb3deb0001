"""Products of fp32 as IEEE has them, whatever a caller asked for: `torch.set_float32_matmul_precision` and its kin.

They let fp32 products pass through bf16 or TF32 on processors that can. One setting holds for all threads: the first
product in here puts it aside, the last one out puts it back.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch.compiler import is_compiling

IEEE = ("none", "ieee")  # settings under which fp32 is multiplied as fp32


class _Setting(AbstractContextManager[None]):
    """That of one kind of device, put aside while somebody is in here."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._inside = 0
        self._asked = "none"

    def asked(self) -> str:
        """What the caller asked for."""
        with self._lock:
            return self._asked if self._inside else self._get()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._asked = self._get()
                if self._asked not in IEEE:
                    self._set("ieee")
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._inside -= 1
            changed = (
                self._asked not in IEEE and self._get() == "ieee"
            )  # by us, and by nobody since
            if changed and not self._inside:
                self._set("none")  # it may have been inherited
                if self._get() != self._asked:
                    self._set(self._asked)

    def _get(self) -> str:
        return str(torch._C._get_fp32_precision_getter(self._backend, "matmul"))

    def _set(self, precision: str) -> None:
        torch._C._set_fp32_precision_setter(self._backend, "matmul", precision)


SETTINGS = {"cpu": _Setting("mkldnn"), "cuda": _Setting("cuda")}


def ieee(device: torch.device) -> AbstractContextManager[None]:
    """Products in here are IEEE, on CPUs and CUDA GPUs; a compiled graph follows what is set where it runs."""
    setting = None if is_compiling() else SETTINGS.get(device.type)
    return nullcontext() if setting is None else setting


def ieee_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` of fp32 matrices, [T, K] and [N, K]."""
    with ieee(x.device):
        return x @ weight.t()


def is_ieee(device: torch.device) -> bool:
    """Whether fp32 products are IEEE here without more ado: on a CPU whose caller asked for nothing else."""
    return device.type == "cpu" and SETTINGS["cpu"].asked() in IEEE

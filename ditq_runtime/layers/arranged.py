"""Int4 weights of a layer stand once in memory: in the order of the kernels where a GPU will read them.

Parameters keep their names, shapes, dtypes and bytes; `ditq_kernels.codes.arranged` says what moves, and strides tell
the order, so that whatever carries tensors from device to device carries it. State dictionaries, and so files and their
digests, are in the file's order always. On a CPU either order gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditq_kernels.codes import packing
from ditq_kernels.codes.arranged import arrange, can_arrange, in_file_order
from ditq_kernels.launch import backend, gpus

NAMES = {  # as `codes.arranged` takes them: the codes, then what belongs to groups
    "w4p": ("weight", "group_scale", "group_offset"),
    "w4g": ("weight", "weight_scale", "weight_zero", "weight_sum"),
}


def read_by_kernels(device: torch.device) -> bool:
    """Whether kernels run on a device, or will where weights go next."""
    return backend.backend_of("gemm_w4a8", device) == "triton" or torch.cuda.is_available()


def refuse_unserved(device: torch.device) -> None:
    """NotImplementedError for a GPU whose kernels would refuse to run; not where the reference was chosen."""
    if device.type == "cuda" and backend.backend_of("gemm_w8a8", device) == "triton":
        gpus.refuse(device)


class Arranged(nn.Module):
    """A layer whose `format` says how its weights are stored; see the module."""

    format: Any

    def arrange(self) -> None:
        """Bring weights that kernels read into their order, in place; those that cannot be are left."""
        kind, parts = self._int4()
        if not parts or parts[0].is_meta or packing.is_arranged(parts[1]):
            return
        if can_arrange(kind, *parts[:2]):
            self._put(arrange(kind, *parts))

    def restore(self) -> None:
        """Bring weights into the file's order, in place."""
        kind, parts = self._int4()
        if parts and packing.is_arranged(parts[1]):
            self._put(in_file_order(kind, *parts))

    def _int4(self) -> tuple[str, tuple[torch.Tensor, ...]]:
        """Kind and tensors of weights that a kernel would read in another order; none of others."""
        kind = self.format.weights
        if not self.format.integer_gemm or kind not in NAMES:
            return kind, ()
        found = (self._parameters.get(name) for name in NAMES[kind])
        return kind, tuple(one.data for one in found if one is not None)

    def _put(self, parts: tuple[torch.Tensor, ...]) -> None:
        held = (self._parameters.get(name) for name in NAMES[self.format.weights])
        for parameter, part in zip((p for p in held if p is not None), parts, strict=True):
            parameter.data = part

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What comes to a GPU is brought into the order of its kernels, there, once; it keeps that elsewhere."""
        super()._apply(fn, recurse)
        _, parts = self._int4()
        if parts and backend.backend_of("gemm_w4a8", parts[0].device) == "triton":
            self.arrange()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        kind, parts = self._int4()
        if parts and packing.is_arranged(parts[1]):
            names = (name for name in NAMES[kind] if self._parameters.get(name) is not None)
            for name, part in zip(names, in_file_order(kind, *parts), strict=True):
                destination[prefix + name] = part

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        _, parts = self._int4()
        if parts and backend.backend_of("gemm_w4a8", parts[0].device) == "triton":
            self.arrange()


def arrange_weights(model: nn.Module) -> None:
    """Bring the weights of a loaded model into the order of the kernels that will read them.

    Raises:
        NotImplementedError: they are on a GPU that cannot run them.
    """
    for module in model.modules():
        if isinstance(module, Arranged):
            device = module.get_parameter("weight").device
            refuse_unserved(device)
            if read_by_kernels(device):
                module.arrange()

"""Site: one input that linears share, and its quantizer.

It stands in the block (`ditq_sites`), once; the linears that read it hold a reference that is no submodule of theirs
and call it, so that hooks which move weights fire.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

import ditq_kernels as k
from ditq_runtime.format.site import SiteFormat
from ditq_runtime.layers import check_nan
from ditq_runtime.layers.pinned import Pinned
from ditq_runtime.layers.timestep_groups import group_index, of_groups


class Codes(NamedTuple):
    """The quantized input of linears.

    Attributes:
        q: int8 [T, K].
        scale: fp32, one a row [T], or one for all [1].
        zero_point: int32, as many: the code of 0.0; None: 0.
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None


class Site(Pinned):
    """The quantizer of x' = (x - shift[g]) * smooth_inv, as far as no producer absorbed it, and what one did absorb.

    Attributes:
        format: what is stored and where the transform went.
        in_features: K.
        smooth_inv: fp32 [K] that the quantizer multiplies by.
        shift: fp32 [S, K] that it subtracts first.
        act_scale: fp32 [1], static activations.
        act_zero: int32 [1], static activations.
        scale: fp32 [K], the factor s that a producer absorbed as 1 / s; playback does not read it, adapters do.
        fold_shift: fp32 [S, K], the shift that a producer absorbed; likewise.
    """

    smooth_inv: nn.Parameter | None
    shift: nn.Parameter | None
    act_scale: nn.Parameter
    act_zero: nn.Parameter
    scale: nn.Parameter | None
    fold_shift: nn.Parameter | None

    def __init__(
        self, in_features: int, site_format: SiteFormat, device: torch.device | str = "meta"
    ) -> None:
        """Allocate the stored tensors, uninitialized."""
        super().__init__()
        self.in_features, self.format = in_features, site_format
        for name in ("smooth_inv", "shift", "scale", "fold_shift"):
            self.register_parameter(name, None)
        for name, (dtype, shape) in site_format.tensors(in_features).items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def is_static(self) -> bool:
        """One calibrated scale and zero point quantize it."""
        return self.format.activations == "static"

    @property
    def leaves_codes(self) -> bool:
        """A GEMM or attention before it can leave its codes: static, nothing to subtract."""
        return self.is_static and self._parameters["shift"] is None and not check_nan.ON

    def forward(self, rows: torch.Tensor) -> Codes:
        """Quantize.

        Args:
            rows: [T, K] fp32 | fp16 | bf16, rows contiguous.

        Returns:
            Their codes.
        """
        held: Any = self._parameters  # not by attribute: torch looks for those in Python
        if self.is_static:
            self._look(rows)
            scale, zero, options = held["act_scale"], held["act_zero"], self._subtraction(rows)
            q = k.quantize_static(rows, scale, zero, held["smooth_inv"], **options)
            return Codes(q, scale, zero)
        return Codes(*k.quantize_per_token(rows, held["smooth_inv"], **self._token(rows)))

    def transformed(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [T, K] fp32 as they are quantized: shifted and smoothed."""
        rows = rows.float()
        if self.shift is not None:
            one = self.format.shifts == 1
            rows = rows - (self.shift if one else of_groups(self.shift, len(rows)))
        return rows if self.smooth_inv is None else rows * self.smooth_inv

    def of_gelu(self, rows: torch.Tensor) -> Codes:
        """The codes of GELU (tanh form) of rows [T, K]."""
        smooth_inv: Any = self._parameters["smooth_inv"]
        if self.is_static:
            self._look(rows)
            options = self._static() | self._subtraction(rows)
            q, scale = k.gelu_quantize(rows, smooth_inv, **options)
            return Codes(q, scale, options["zero_point"])
        return Codes(*k.gelu_quantize(rows, smooth_inv, **self._token(rows)))

    def of_adaln(
        self, rows: torch.Tensor, multiplier: torch.Tensor, shift: torch.Tensor, eps: float
    ) -> Codes:
        """The codes of LN(rows) * multiplier + shift: rows [T, K], the others [B, K] fp32."""
        held: Any = self._parameters
        options: dict[str, Any] = {}
        if held["shift"] is not None and self.format.shifts == 1:
            shift = shift - held["shift"]
        else:
            options = self._subtraction(shift)
        if self.is_static:
            self._look(rows, multiplier, shift)
            options |= self._static()
        elif self.format.activations == "token_asym":
            options["asymmetric"] = True
        made = k.adaln_quantize(rows, multiplier, shift, held["smooth_inv"], eps=eps, **options)
        q, step, *zero_point = made[:-1]
        return Codes(q, step, zero_point[0] if zero_point else options.get("zero_point"))

    def output(self) -> dict[str, Any]:
        """Arguments of an op before it that leaves its codes, where `leaves_codes`."""
        held: Any = self._parameters
        return {
            "out_scale": held["act_scale"],
            "out_zero_point": held["act_zero"],
            "out_smooth_inv": held["smooth_inv"],
        }

    def codes_left(self, q: torch.Tensor) -> Codes:
        """What such an op left."""
        held: Any = self._parameters
        return Codes(q, held["act_scale"], held["act_zero"])

    def _static(self) -> dict[str, Any]:
        held: Any = self._parameters
        return {"scale": held["act_scale"], "zero_point": held["act_zero"]}

    def _look(self, *values: torch.Tensor) -> None:
        if check_nan.ON:
            for part in values:
                check_nan.refuse_nan(part, f"the site of {', '.join(self.format.readers)}")

    def _token(self, rows: torch.Tensor) -> dict[str, Any]:
        options = self._subtraction(rows)
        return (
            options | {"asymmetric": True} if self.format.activations == "token_asym" else options
        )

    def _subtraction(self, rows: torch.Tensor) -> dict[str, Any]:
        """Arguments of an op that subtracts the shift of the timestep group of each of these rows."""
        shift: Any = self._parameters["shift"]
        if shift is None:
            return {}
        if self.format.shifts == 1:
            return {"group_shift": shift}
        return {"group_shift": shift, "group_index": group_index(len(rows))}

    def extra_repr(self) -> str:
        """For `print(model)`."""
        shown = self.format
        parts = [f"in_features={self.in_features}", shown.activations, f"place={shown.place}"]
        parts += ["smooth"] * shown.smooth + [f"shifts={shown.shifts}"] * (shown.shifts > 0)
        return ", ".join(parts)

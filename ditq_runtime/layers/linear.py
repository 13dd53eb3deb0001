"""QuantLinear: a linear layer played from packed tensors.

It is an `nn.Linear` subclass with a `weight`, because diffusers, accelerate and PEFT look for exactly that.
Its scales, biases and other fp32 tensors stay fp32 through every dtype cast of the model.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

import ditq_kernels as k
from ditq_kernels.codes.products import ieee
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.layers.arranged import Arranged, refuse_unserved
from ditq_runtime.layers.pinned import Pinned
from ditq_runtime.layers.site import Codes, Site
from ditq_runtime.layers.timestep_groups import group_index, of_groups


class QuantLinear(Arranged, Pinned, nn.Linear):
    """A linear [N, K] in one of the formats of `LayerFormat`.

    Attributes:
        format: how it is stored and run.
        compute_dtype: dtype of the output; follows `.to(dtype)` of the model.
        wide_output: the output is fp32 whatever the compute dtype. True for modulation linears, because an AdaLN
            multiplier (1 + scale) / s in half precision costs as much as the quantization.
        folded: a producer absorbed a factor of its input, or its own rows were scaled for a consumer.
        site: what it reads, which quantizes it; no submodule, as other linears may read it too. None: float input.
    """

    format: LayerFormat
    compute_dtype: torch.dtype
    wide_output: bool
    folded: bool
    site: Site | None
    weight_scale: nn.Parameter
    weight_zero: nn.Parameter
    group_scale: nn.Parameter
    group_offset: nn.Parameter
    weight_sum: nn.Parameter
    lora_down: nn.Parameter
    lora_up: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layer_format: LayerFormat,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
        wide_output: bool = False,
    ) -> None:
        """Allocate the stored tensors, uninitialized."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.format, self.compute_dtype, self.wide_output = (
            _one(layer_format),
            compute_dtype,
            wide_output,
        )
        self.folded = False
        self.read(None)
        self.register_parameter("bias", None)
        for name, (dtype, shape) in layer_format.tensors(in_features, out_features).items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def read(self, site: Site | None) -> None:
        """Read a site; past `nn.Module`, which would register it as a submodule."""
        self.__dict__["site"] = site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: [..., K] fp32 | fp16 | bf16, already smoothed and shifted by its producer where the scheme folds.

        Returns:
            [..., N] in `compute_dtype`, or fp32 where `wide_output`.
        """
        rows = x.reshape(-1, self.in_features)
        if rows.stride(1) != 1:  # a transposed input, which nn.Linear accepts too
            rows = rows.contiguous()
        out_dtype = torch.float32 if self.wide_output else self.compute_dtype
        y = (
            self.multiply(self.quantize(rows), out_dtype)
            if self.format.integer_gemm
            else self._float(rows, out_dtype)
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def quantize(self, rows: torch.Tensor) -> Codes:
        """The input rows [T, K] as its site quantizes them: what the methods below read."""
        assert self.site is not None
        codes: Codes = self.site(rows)
        return codes

    def multiply(self, codes: Codes, out_dtype: torch.dtype) -> torch.Tensor:
        """The layer [T, N] of a quantized input, with its branch and bias."""
        q, scale, _ = codes
        held: Any = self._parameters  # not by attribute: torch looks for those in Python
        weight, step, bias = held["weight"], held["weight_scale"], held["bias"]
        options: dict[str, Any] = {**self.epilogue(codes), "out_dtype": out_dtype}
        if self.format.weights == "w8":
            return k.gemm_w8a8(q, weight, scale, step, bias, **options)
        if self.format.weights == "w4g":
            return k.gemm_w4a8_per_group(
                q, weight, scale, step, held["weight_zero"], bias, **options
            )
        group = (held["group_scale"], held["group_offset"])
        return k.gemm_w4a8(q, weight, scale, *group, step, bias, **options)

    def add_to(
        self, residual: torch.Tensor, gate: torch.Tensor | None, codes: Codes
    ) -> torch.Tensor:
        """Residual [T, N] + gate [B, N] fp32 * layer (no gate: + layer), in the dtype of the residual stream."""
        return k.gemm_residual(
            codes.q,
            self.packed(),
            codes.scale,
            self._parameters["bias"],
            residual=residual,
            gate=gate,
            **self.epilogue(codes),
        )

    def gelu_codes(self, consumer: QuantLinear, codes: Codes) -> Codes:
        """The quantized input of `consumer`, which reads GELU (tanh form) of this layer."""
        site = consumer.site
        assert site is not None
        if not site.leaves_codes:
            return site.of_gelu(self.multiply(codes, self.compute_dtype))
        options = {**site.output(), **self.epilogue(codes)}
        bias = self._parameters["bias"]
        q = k.gemm_gelu_quantize(codes.q, self.packed(), codes.scale, bias, **options)
        return site.codes_left(q)

    def packed(self) -> k.W8 | k.W4P | k.W4G:
        """The weights of an integer layer, for ops that take any."""
        held: Any = self._parameters
        if self.format.weights == "w8":
            return k.W8(held["weight"], held["weight_scale"])
        if self.format.weights == "w4g":
            return k.W4G(held["weight"], held["weight_scale"], held["weight_zero"])
        groups = held["group_scale"], held["group_offset"]
        return k.W4P(held["weight"], *groups, held["weight_scale"])

    def epilogue(self, codes: Codes) -> dict[str, torch.Tensor]:
        """What a GEMM adds to its product: zero point, bias per timestep group, low-rank branch."""
        options: dict[str, torch.Tensor] = {}
        if codes.zero_point is not None:
            weight_sum: Any = self._parameters["weight_sum"]
            options = {"zero_point": codes.zero_point, "weight_sum": weight_sum}
        if self.format.lora_rank:
            q, scale, zero_point = codes
            options["lora_x"] = k.lora_down(q, self.lora_down, scale, zero_point=zero_point)
            options["lora_up"] = self.lora_up
        if self.format.groups > 1:
            options["bias_index"] = group_index(len(codes.q))
        return options

    def _float(self, rows: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        if self.format.groups == 1:
            return self._weight_only(rows, self._parameters["bias"], out_dtype)
        y = self._weight_only(rows, None, torch.float32)  # then the bias, then the cast
        return (y + of_groups(self.bias, len(y))).to(out_dtype)

    def _weight_only(
        self, rows: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        if self.format.weights == "fp32":
            return _linear_fp32(rows.float(), self.weight, bias).to(out_dtype)
        if self.format.weights == "w8":
            held: Any = self._parameters
            scale = held["weight_scale"]
            return k.linear_w8(rows, held["weight"], scale, bias, out_dtype=out_dtype)
        if self.format.weights == "w4g":
            group = (self.weight_scale, self.weight_zero)
            return k.linear_w4_per_group(rows, self.weight, *group, bias, out_dtype=out_dtype)
        group = (self.group_scale, self.group_offset)
        return k.linear_w4(rows, self.weight, *group, self.weight_scale, bias, out_dtype=out_dtype)

    def dequantized_weight(self) -> torch.Tensor:
        """The weight the codes stand for: fp32 [N, K], in the folded units of the scheme."""
        if self.format.weights == "fp32":
            return self.weight.detach()
        codes = self.weight.data
        if self.format.weights == "w4g":
            return k.dequantize_w4g(codes, self.weight_scale.data, self.weight_zero.data)
        if self.format.weights == "w4p":
            codes = k.expand_w4p(self.weight, self.group_scale, self.group_offset)
        return codes.float() * self.weight_scale[:, None]

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        """Move every tensor, cast none; the compute dtype follows the cast. Refuse a GPU that cannot run it."""
        moved = fn(torch.empty(0, dtype=self.compute_dtype))
        refuse_unserved(moved.device)
        super()._apply(fn, recurse)
        self.compute_dtype = moved.dtype
        return self

    def extra_repr(self) -> str:
        """Shape and format, for `print(model)`."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, {self.format}, compute_dtype={self.compute_dtype}"


@functools.cache
def _one(layer_format: LayerFormat) -> LayerFormat:
    """The first of all formats that are equal to one: fused blocks compare them at every call."""
    return layer_format


def _linear_fp32(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A linear that stays fp32: neither autocast nor `set_float32_matmul_precision` takes it to half precision."""
    device = rows.device.type
    with ieee(rows.device):
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return nn.functional.linear(rows, weight, bias)
        return nn.functional.linear(rows, weight, bias)

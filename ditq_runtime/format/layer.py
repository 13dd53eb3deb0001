"""The format of a linear: its codes, its activations, its bias. docs/format.md is the prose twin of this file."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

import ditq_kernels as kernels
from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.rules import Rule, check_record

Stored = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor -> dtype, shape
WEIGHTS = ("w8", "w4p", "w4g", "fp32")
GROUPED = ("w4p", "w4g")  # weights whose codes share scales along the inputs
GEMMS = {"w8": "gemm_w8a8", "w4p": "gemm_w4a8", "w4g": "gemm_w4a8_per_group"}
LINEARS = {"w8": "linear_w8", "w4p": "linear_w4", "w4g": "linear_w4_per_group"}
ACTIVATIONS = ("token", "token_asym", "static", "none")
ZERO_POINT = ("token_asym", "static")  # activations whose codes have one: weight sums are stored
RULES = {
    "weights": Rule(str, WEIGHTS),
    "activations": Rule(str, ACTIVATIONS),
    "group_size": Rule(int, least=1, nullable=True),
    "bias": Rule(bool),
    "groups": Rule(int, least=1),
    "lora_rank": Rule(int, least=0),
}


@dataclass(frozen=True)
class LayerFormat:
    """How one linear is stored and run.

    Attributes:
        weights: `w8` int8 per output channel, `w4p` 4-bit two-level groups, `w4g` 4-bit with a real scale per
            group, `fp32` unquantized.
        activations: `token` int8 with one scale per token, computed when it runs; `token_asym` the same with a zero
            point per token; `static` int8 with one calibrated scale and zero point; `none` float (a weight-only
            layer, as modulation linears are). Those of its site.
        group_size: input channels that share a group of `w4p` or `w4g`; None for the other weights.
        bias: the layer has a bias.
        groups: timestep groups of the bias; 1: one bias for all timesteps.
        lora_rank: rank of the low-rank branch that the codes leave to it; 0: none.
    """

    weights: str
    activations: str
    group_size: int | None = None
    bias: bool = True
    groups: int = 1
    lora_rank: int = 0

    def __post_init__(self) -> None:
        """Refuse combinations that no op runs."""
        check_record(asdict(self), RULES, "format")
        if (self.weights in GROUPED) != (self.group_size is not None):
            raise CheckpointError(
                f"format: group_size belongs to w4p and w4g and only there, got weights={self.weights!r}, "
                f"group_size={self.group_size!r}"
            )
        if self.weights == "fp32" and self.activations != "none":
            raise CheckpointError("format: fp32 weights cannot have quantized activations")
        if self.groups > 1 and not self.bias:
            raise CheckpointError("format: timestep groups need a bias")
        if self.lora_rank and not self.integer_gemm:
            raise CheckpointError("format: a low-rank branch needs quantized activations")

    @property
    def name(self) -> str:
        """A readable name: `w8_token`, `w4p64_static`, `w8_weight_only`, `fp32`."""
        parts = [f"{self.weights}{self.group_size or ''}"]
        if self.weights != "fp32":
            parts.append("weight_only" if self.activations == "none" else self.activations)
        parts += ["nobias"] * (not self.bias)
        parts += [f"groups{self.groups}"] * (self.groups > 1)
        parts += [f"lora{self.lora_rank}"] * (self.lora_rank > 0)
        return "_".join(parts)

    @property
    def integer_gemm(self) -> bool:
        """Both operands of the matrix product are integers."""
        return self.activations != "none"

    @property
    def ops(self) -> tuple[str, ...]:
        """The `ditq::` ops one forward of the layer runs, in order, its site's quantizer included."""
        if self.weights == "fp32":
            return ()
        if not self.integer_gemm:
            return (LINEARS[self.weights],)
        quantizer = "quantize_static" if self.activations == "static" else "quantize_per_token"
        low_rank = ("lora_down",) if self.lora_rank else ()
        return (quantizer, *low_rank, GEMMS[self.weights])

    def tensors(self, in_features: int, out_features: int) -> Stored:
        """The tensors stored for a layer `[out_features, in_features]`: name -> dtype, shape."""
        k, n = in_features, out_features
        stored: Stored = {}
        if self.weights == "fp32":
            stored["weight"] = (torch.float32, (n, k))
        elif self.weights == "w8":
            stored["weight"] = (torch.int8, (n, k))
            stored["weight_scale"] = (torch.float32, (n,))
        elif self.weights == "w4g":
            stored["weight"] = (torch.uint8, (n, k // 2))
            stored["weight_scale"] = (torch.float32, (n, self._groups(k)))
            stored["weight_zero"] = (torch.uint8, (n, self._groups(k)))
        else:
            groups = self._groups(k)
            stored["weight"] = (torch.uint8, (n, k // 2))
            stored["weight_scale"] = (torch.float32, (n,))
            stored["group_scale"] = (torch.uint8, (n, groups))
            stored["group_offset"] = (torch.int8, (n, groups))
        if self.activations in ZERO_POINT:
            sums = (n, self._groups(k)) if self.weights == "w4g" else (n,)
            stored["weight_sum"] = (torch.int32, sums)
        if self.bias:
            stored["bias"] = (torch.float32, (n,) if self.groups == 1 else (self.groups, n))
        if self.lora_rank:
            stored["lora_down"] = (torch.bfloat16, (self.lora_rank, k))
            stored["lora_up"] = (torch.bfloat16, (n, self.lora_rank))
        return stored

    def _groups(self, in_features: int) -> int:
        size = self.group_size
        if self.weights == "w4g" and type(size) is int and kernels.fits_w4g(in_features, size):
            return in_features // size
        if type(size) is not int or size < 32 or size % 32 or in_features % size:
            raise CheckpointError(
                f"format: group_size must be a multiple of 32 that divides the {in_features} inputs, "
                f"got {size!r}; convert again with another --group-size"
            )
        return in_features // size

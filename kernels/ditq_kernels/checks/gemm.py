"""Checks of what a GEMM does after its sums: scales, zero points, biases, low-rank branches.

As in `checks`, each raises ValueError with one sentence.
"""

import torch

from ditq_kernels.checks import tensors as checks


def check_channels(
    op: str,
    x: torch.Tensor,
    out_features: int,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """One weight scale and one bias for each output."""
    checks.check_vector(op, "weight_scale", weight_scale, torch.float32, (out_features,), like=x)
    check_bias(op, x, out_features, bias)


def check_bias(op: str, x: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> None:
    """One bias for each output, if there is any."""
    if bias is not None:
        checks.check_vector(op, "bias", bias, torch.float32, (out_features,), like=x)


def check_bias_and_branch(
    op: str,
    q: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    bias_index: torch.Tensor | None,
    lora_x: torch.Tensor | None,
    lora_up: torch.Tensor | None,
) -> None:
    """What every GEMM may add to its dequantized sums."""
    if out_features > checks.MAX_ROW_STEP:
        raise ValueError(
            f"{op}: N must be at most {checks.MAX_ROW_STEP}, got N={out_features}; split the layer along N"
        )
    if bias_index is None:
        check_bias(op, q, out_features, bias)
    check_bias_table(op, q, out_features, bias, bias_index)
    check_low_rank(op, q, out_features, lora_x, lora_up)


def check_epilogue(
    op: str,
    q: torch.Tensor,
    out_features: int,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias_index: torch.Tensor | None,
    lora_x: torch.Tensor | None,
    lora_up: torch.Tensor | None,
) -> None:
    """The arguments that GEMM ops with one weight scale a row share; see `ops.gemm_w8a8`."""
    checks.check_accumulator(op, q.shape[1], asymmetric=zero_point is not None)
    _check_scale_and_zero_point(op, q, scale, zero_point, weight_sum)
    checks.check_vector(op, "weight_scale", weight_scale, torch.float32, (out_features,), like=q)
    if weight_sum is not None:
        checks.check_vector(op, "weight_sum", weight_sum, torch.int32, (out_features,), like=q)
    check_bias_and_branch(op, q, out_features, bias, bias_index, lora_x, lora_up)


def check_epilogue_of_groups(
    op: str,
    q: torch.Tensor,
    out_features: int,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias_index: torch.Tensor | None,
    lora_x: torch.Tensor | None,
    lora_up: torch.Tensor | None,
) -> None:
    """The same with real groups, whose scales `checks.check_real_groups` looks at; see `gemm_w4a8_per_group`."""
    _check_scale_and_zero_point(op, q, scale, zero_point, weight_sum)
    if weight_sum is not None:
        checks.check_group_sums(op, weight_sum, weight_scale, like=q)
    check_bias_and_branch(op, q, out_features, bias, bias_index, lora_x, lora_up)


def _check_scale_and_zero_point(
    op: str,
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
) -> None:
    """Those of the activations: one a row, or one; a zero point comes with sums of weights, which callers check."""
    checks.check_vector(op, "scale", scale, torch.float32, (q.shape[0], 1), like=q)
    checks.check_zero_point(op, zero_point, weight_sum)
    if zero_point is not None:
        checks.check_vector(op, "zero_point", zero_point, torch.int32, (q.shape[0], 1), like=q)


def check_samples(op: str, name: str, samples: int, num_tokens: int) -> None:
    """Samples of one size: their number divides the number of rows."""
    if samples == 0 or num_tokens % samples:
        raise ValueError(
            f"{op}: {name} must have one entry for each sample, and samples equally many of the "
            f"T={num_tokens} rows, got {samples} entries; pass one per sample, one per row, or one"
        )


def check_bias_table(
    op: str,
    q: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    bias_index: torch.Tensor | None,
) -> None:
    """A bias per group and a group per sample."""
    if bias_index is None:
        return
    if bias is None or bias.dim() != 2 or bias.shape[1] != out_features:
        found = "none" if bias is None else list(bias.shape)
        raise ValueError(
            f"{op}: with bias_index, bias must be [G, {out_features}] float32, got {found}; "
            "pass one bias per group, or no bias_index"
        )
    checks.check_matrix(op, "bias", bias, (torch.float32,), "[G, N]")
    if not bias.is_contiguous():
        raise ValueError(
            f"{op}: bias must be contiguous, got strides {tuple(bias.stride())}; call .contiguous()"
        )
    checks.check_device(op, "bias", bias, q)
    length = (bias_index.numel(),)
    checks.check_vector(op, "bias_index", bias_index, torch.int64, length, like=q)
    check_samples(op, "bias_index", bias_index.numel(), q.shape[0])


def check_low_rank(
    op: str,
    q: torch.Tensor,
    out_features: int,
    lora_x: torch.Tensor | None,
    lora_up: torch.Tensor | None,
) -> None:
    """Both factors of a low-rank branch, of one rank."""
    if (lora_x is None) != (lora_up is None):
        missing = "lora_x" if lora_x is None else "lora_up"
        raise ValueError(
            f"{op}: lora_x and lora_up go together, {missing} is missing; pass lora_x = "
            "lora_down(...) and the lora_up of the layer, or neither"
        )
    if lora_x is None or lora_up is None:
        return
    for name, tensor, rows in (
        ("lora_x", lora_x, q.shape[0]),
        ("lora_up", lora_up, out_features),
    ):
        shape = f"[{rows}, R]"
        checks.check_matrix(op, name, tensor, (torch.bfloat16,), shape)
        if tensor.shape != (rows, lora_up.shape[1]):
            raise ValueError(
                f"{op}: {name} must be [{rows}, {lora_up.shape[1]}], got {list(tensor.shape)}; "
                "pass both factors of one layer"
            )
        checks.check_device(op, name, tensor, q)

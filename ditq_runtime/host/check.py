"""Hold a built model against a checkpoint: names, shapes and dtypes before its weights are read, values after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

import ditq_kernels as k
from ditq_kernels.codes.arranged import in_file_order
from ditq_runtime.attention.quantized import QuantAttention
from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.safetensors_header import TensorInfo
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.pinned import Pinned
from ditq_runtime.layers.site import Site
from ditq_runtime.layers.timestep_groups import TimestepGroups

LAST_CODE = 15
POSITIVE = ("act_scale", "smooth_inv", "scale")  # of a site


def check_tensors(
    found: Mapping[str, TensorInfo], skeleton: nn.Module, absent: Iterable[str] = ()
) -> None:
    """Compare what the files hold with what the skeleton needs.

    Args:
        found: headers of the files.
        skeleton: the model with its QuantLinear modules in place, on meta.
        absent: prefixes of tensors that are stored elsewhere (a shared embedder) and must not be in the file.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown, of another shape or of another dtype.
    """
    packed = {n for n, m in skeleton.named_modules() if isinstance(m, Pinned)}
    expected = {
        name: tensor
        for name, tensor in skeleton.state_dict().items()
        if not name.startswith(tuple(f"{prefix}." for prefix in absent))
    }
    for name in sorted(expected.keys() - found.keys()):
        raise CheckpointError(
            f"{name}: missing from the checkpoint; it is incomplete, convert or copy it again"
        )
    for name in sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{name}: unknown tensor in the checkpoint; its config.json does not list it"
        )
    for name, tensor in expected.items():
        info = found[name]
        if info.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name}: shape {list(info.shape)} in the checkpoint, {list(tensor.shape)} expected by config.json"
            )
        if name.rpartition(".")[0] in packed:
            if info.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{name}: dtype {info.dtype} in the checkpoint, {tensor.dtype} expected"
                )
        elif info.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"{name}: dtype {info.dtype} in the checkpoint, a {tensor.dtype} expected"
            )


def check_values(model: nn.Module, codes: bool = True) -> None:
    """Refuse tensors that cannot be what a converter wrote; names the tensor.

    Args:
        model: a packed transformer with its weights.
        codes: look at the integer weights too; not where digests say that they are what was saved, as saving looks.

    Raises:
        CheckpointError: a non-finite float, a scale that is not positive, a code out of range, a weight sum that
            is not the sum of its weights.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
            raise CheckpointError(
                f"{name}: holds a value that is not finite; the checkpoint is damaged"
            )
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            _check_positive(name, module, ("weight_scale",))
            if codes:
                _check_codes(name, module)
        elif isinstance(module, Site):
            _check_site(name, module)
        elif isinstance(module, QuantAttention):
            _check_positive(name, module, list(module.format.tensors(module.heads)))
        elif isinstance(module, TimestepGroups) and not bool((module.bounds.diff() > 0).all()):
            raise CheckpointError(f"{name}.bounds: boundaries must rise; the checkpoint is damaged")


def _is_finite(tensor: torch.Tensor) -> bool:
    """By the extremes, which a NaN comes through to: one pass, four times as fast as looking at each value."""
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _check_site(name: str, site: Site) -> None:
    _check_positive(name, site, POSITIVE)
    if site.is_static and not -128 <= int(site.act_zero) <= 127:
        raise CheckpointError(f"{name}.act_zero: {int(site.act_zero)} is outside [-128, 127]")


def _check_codes(name: str, layer: QuantLinear) -> None:
    codes, sums = _int8_weight(name, layer), getattr(layer, "weight_sum", None)
    if codes is None or sums is None:
        return
    # [N], or [N, J] of groups
    if not torch.equal(codes.reshape(*sums.shape, -1).sum(-1).int(), sums.data):
        raise CheckpointError(
            f"{name}.weight_sum: not the row sums of {name}.weight; one of them is damaged"
        )


def _check_positive(name: str, module: nn.Module, fields: Iterable[str]) -> None:
    for field in fields:
        tensor = getattr(module, field, None)
        if tensor is not None and not bool((tensor > 0).all()):
            raise CheckpointError(
                f"{name}.{field}: every scale must be positive; the checkpoint is damaged"
            )


def _int8_weight(name: str, layer: QuantLinear) -> torch.Tensor | None:
    """The layer's integer weights [N, K], range-checked; None for fp32 weights."""
    if layer.format.weights == "fp32":
        return None
    codes: torch.Tensor = layer.weight
    if layer.format.weights == "w4g":
        if bool((layer.weight_zero > LAST_CODE).any()):
            raise CheckpointError(
                f"{name}.weight_zero: a zero point is outside 0..{LAST_CODE}; the checkpoint is damaged"
            )
        return k.expand_w4g(layer.weight, layer.weight_zero)
    if layer.format.weights == "w4p":
        if bool((layer.group_scale == 0).any()):
            raise CheckpointError(
                f"{name}.group_scale: a group has scale 0; the checkpoint is damaged"
            )
        parts = layer.weight.data, layer.group_scale.data, layer.group_offset.data
        packed, scale, offset = in_file_order("w4p", *parts)
        nibbles = k.unpack_int4(packed).unflatten(1, (scale.shape[1], -1)).to(torch.int16)
        codes = (nibbles * scale[..., None].to(torch.int16) + offset[..., None]).flatten(1)
    least, most = codes.aminmax()
    if int(least) < -127 or int(most) > 127:
        raise CheckpointError(
            f"{name}.weight: an integer weight is outside [-127, 127]; the checkpoint is damaged"
        )
    return codes

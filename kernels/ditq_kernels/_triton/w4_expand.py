"""Progressive int4 weights to int8, once: one read of the codes, one write of the weights."""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import on_device_of, run_kernel
from ditq_kernels.codes.arranged import in_file_order
from ditq_kernels.launch import tuning

BYTES = 256  # of a row in one program


@triton.jit
def _w4_expand_kernel(
    packed_ptr, group_scale_ptr, group_offset_ptr, out_ptr,  # [N, K / 2], [N, J] uint8 and int8, [N, K] int8
    N, K, stride_pn, stride_gn, stride_fn,
    GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    inside = (n < N)[:, None] & (byte < K // 2)[None, :]
    rows = n.to(tl.int64)[:, None]  # int64: N * K may pass 2**31
    group = (byte * 2 // GROUP_SIZE)[None, :]
    codes = tl.load(packed_ptr + rows * stride_pn + byte[None, :], mask=inside, other=0).to(tl.int32)
    scale = tl.load(group_scale_ptr + rows * stride_gn + group, mask=inside, other=0).to(tl.int32)
    offset = tl.load(group_offset_ptr + rows * stride_fn + group, mask=inside, other=0).to(tl.int32)
    even = ((codes & 15) * scale + offset).to(tl.int8)
    odd = ((codes >> 4) * scale + offset).to(tl.int8)
    k = tl.program_id(1) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    at = out_ptr + rows * K + k[None, :]
    tl.store(at, tl.interleave(even, odd), mask=(n < N)[:, None] & (k < K)[None, :])


def launch(
    packed: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    config: tuning.RowConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `expand.w4_expand`."""
    packed, group_scale, group_offset = in_file_order("w4p", packed, group_scale, group_offset)
    num_rows, in_features = packed.shape[0], 2 * packed.shape[1]
    out = torch.empty((num_rows, in_features), dtype=torch.int8, device=packed.device)
    if out.numel() == 0:
        return out
    if config is None:
        tables = tuning.tables_of(packed.device)
        config = tuning.row_config("w4_expand", tables, num_rows, in_features)
    programs = (triton.cdiv(num_rows, config.rows), triton.cdiv(in_features, 2 * BYTES))
    with on_device_of(packed):
        run_kernel(
            _w4_expand_kernel, programs,
            packed, group_scale, group_offset, out, num_rows, in_features,
            packed.stride(0), group_scale.stride(0), group_offset.stride(0),
            GROUP_SIZE=in_features // group_scale.shape[1], ROWS=config.rows, BYTES=BYTES,
            num_warps=config.num_warps,
        )  # fmt: skip
    return out

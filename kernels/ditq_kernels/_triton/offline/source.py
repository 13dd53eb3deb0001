"""Types of kernel arguments, as a launch in a DiT gives them, and what Triton compiles from them."""

from typing import Any

from triton.compiler import ASTSource

from ditq_kernels._triton.offline import epilogue as offline_epilogue

POINTERS = {
    "x_ptr": "*bf16", "q_ptr": "*i8", "weight_ptr": "*i8", "split_ptr": "*u8",
    "out_ptr": "*bf16", "scale_ptr": "*fp32", "smooth_inv_ptr": "*fp32", "zero_point_ptr": "*i32",
    "multiplier_ptr": "*fp32", "shift_ptr": "*fp32", "in_scale_ptr": "*fp32", "in_zero_point_ptr": "*i32",
    "eps": "fp32", "group_scale_ptr": "*u8", "group_offset_ptr": "*i8", "down_ptr": "*bf16",
    "weight_scale_ptr": "*fp32", "weight_zero_ptr": "*u8", "weight_sum_ptr": "*i32", "bias_ptr": "*fp32",
    "k_ptr": "*i8", "v_ptr": "*bf16", "vt_ptr": "*i8", "v_sum_ptr": "*i32", "key_mask_ptr": "*u8",
    "out_scale_ptr": "*fp32", "out_zero_point_ptr": "*i32", "out_smooth_inv_ptr": "*fp32",
    "q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", "softmax_step": "fp32",
}  # fmt: skip
# what Triton finds at launch: torch memory is aligned, and so are strides of DiT widths
MULTIPLES_OF_16 = frozenset(POINTERS) - {"softmax_step", "eps"} | {
    "N", "K", "stride_xt", "stride_qt", "stride_wn", "stride_sn", "stride_ot", "stride_dr", "R",
    "stride_mb", "stride_sb", "stride_xb", "stride_ob", "rows_per_sample",
    "PADDED_T", "stride_qb", "stride_kb", "stride_vb", "stride_vh", "stride_vd", "keys_to_read",
}  # fmt: skip


def source_of(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> ASTSource:
    """What to compile; a constant may be a tuple of types, see `offline_epilogue`."""
    arguments = {
        name: types.get(name, POINTERS.get(name, "i32")) + (":16" if name in MULTIPLES_OF_16 else "")
        for name in kernel.arg_names
    } | constants
    found = {
        name: offline_epilogue.signature_of(arguments[name], (i,))
        for i, name in enumerate(kernel.arg_names)
    }
    return ASTSource(
        fn=kernel, signature={name: part[0] for name, part in found.items()},
        constexprs={path: value for part in found.values() for path, value in part[1].items()},
        attrs={path: value for part in found.values() for path, value in part[2].items()},
    )  # fmt: skip

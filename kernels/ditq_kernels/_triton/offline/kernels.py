"""Every kernel that compiles without tensors, and the problems that it meets in DiTs."""

from ditq_kernels._triton.offline import attention, epilogue, gemms, many, rows, variants
from ditq_kernels._triton.offline.problem import OfflineKernel, Problem
from ditq_kernels.launch import tuning

ROWS = tuple(Problem(t, k) for t, k in ((8192, 1152), (256, 1152), (8192, 4608), (256, 15360)))
NARROW = (ROWS[0], Problem(131072, 128), *ROWS[1:])  # with channels of heads, a row for each head of a token
GEMM_TOKENS = (8192, 16, 32, 256, 512, 1024, 2048)  # 8192: 16 images of 256 pixels, guided
GEMMS = (*(Problem(t) for t in GEMM_TOKENS), Problem(16, 4608))
FEW_TOKENS = (Problem(512, 4608),)  # fc2 of one guided image
REAL_GROUPS = (*GEMMS[:4], *(Problem(8192, 1152, g, z) for g in (32, 64, 128) for z in (False, True)))
HEADS = tuple(
    Problem(keys, head_dim, zero_point=True) for head_dim in (72, 64, 128) for keys in (1024, 256)
)
QKVS = (Problem(8192, zero_point=True), Problem(256, zero_point=True))
ASYMMETRIC = (Problem(8192, zero_point=True), Problem(16, zero_point=True))
DISTINCT = (80, 89, 90, 120)  # of kernels whose machine code for sm_86 is that for sm_89
FLUX_ROWS = (Problem(4608, 3072),)
HEADS_TYPES = {
    "norm_weight_ptr": "*bf16:16", "cos_ptr": "*fp32:16", "sin_ptr": "*fp32:16", "stride_ct": "i32:16",
    "stride_xh": "i32:16",
}  # fmt: skip
MODULATIONS = (Problem(16), Problem(64))
ROW_KERNELS = {
    "quantize_per_token": OfflineKernel(NARROW, tuning.row_config, rows.row_kernel, checked=2),
    "quantize_static": OfflineKernel(NARROW, tuning.row_config, rows.row_kernel, checked=2),
    "quantize_static+heads": OfflineKernel(
        ROWS[:2], rows.same_rows_as("quantize_static"), rows.heads_kernel
    ),
    "quantize_per_token+shift_asymmetric": OfflineKernel(
        ROWS, rows.same_rows_as("quantize_per_token"), rows.row_kernel, targets=DISTINCT
    ),
    "quantize_static+shift": OfflineKernel(
        ROWS, rows.same_rows_as("quantize_static"), rows.row_kernel, targets=DISTINCT
    ),
    "gelu_quantize_per_token+shift_asymmetric": OfflineKernel(
        ROWS, rows.same_rows_as("quantize_per_token"), rows.row_kernel, targets=DISTINCT
    ),
    "adaln_quantize_per_token+asymmetric": OfflineKernel(
        ROWS[:3], rows.same_rows_as("adaln_quantize"), rows.adaln_kernel, targets=DISTINCT
    ),
    "quantize_heads": OfflineKernel(
        FLUX_ROWS, rows.attention_heads_config, rows.attention_heads_kernel, HEADS_TYPES
    ),
    "quantize_heads+wide_norm": OfflineKernel(
        FLUX_ROWS, rows.attention_heads_config, rows.attention_heads_kernel, HEADS_TYPES, targets=DISTINCT
    ),
    "gelu_quantize_per_token": OfflineKernel(ROWS, rows.same_rows_as("quantize_per_token"), rows.row_kernel),
    "gelu_quantize_static": OfflineKernel(ROWS, rows.same_rows_as("quantize_static"), rows.row_kernel),
    "adaln_quantize_per_token": OfflineKernel(ROWS[:3], rows.same_rows_as("adaln_quantize"), rows.adaln_kernel),
    "adaln_quantize_static": OfflineKernel(ROWS[:3], rows.same_rows_as("adaln_quantize"), rows.adaln_kernel),
}
PLAIN_GEMMS = {
    "gemm_w8a8": OfflineKernel(GEMMS, tuning.tile_config, gemms.w8a8_kernel),
    "gemm_w4a8": OfflineKernel(GEMMS, tuning.tile_config, gemms.w4a8_kernel),
    "gemm_w4a8_per_group": OfflineKernel(REAL_GROUPS, tuning.tile_config, gemms.w4a8_per_group_kernel),
    "gemm_w8a8+qkv_quantize": OfflineKernel(QKVS, epilogue.tiles_of, gemms.qkv_w8a8_kernel, {"T": "i32:16"}),
    "gemm_w4a8+qkv_quantize": OfflineKernel(QKVS, epilogue.tiles_of, gemms.qkv_w4a8_kernel, {"T": "i32:16"}),
    "gemm_w4a8_per_group+qkv_quantize": OfflineKernel(
        QKVS, epilogue.tiles_of, gemms.qkv_w4a8_per_group_kernel, {"T": "i32:16"}
    ),
    "lora_down": OfflineKernel((GEMMS[0], GEMMS[1]), tuning.tile_config, gemms.lora_down_kernel),
    "linear_w8": OfflineKernel(MODULATIONS, tuning.tile_config, gemms.weight_only_kernel, {"x_ptr": "*fp32"}),
    "linear_w4": OfflineKernel(
        MODULATIONS, tuning.tile_config, gemms.weight_only_kernel, {"x_ptr": "*fp32", "weight_ptr": "*u8"}
    ),
}
MANY = {
    f"{gemm}+many": OfflineKernel((GEMMS[0], Problem(256, zero_point=True)), many.tiles_of, kernel)
    for gemm, kernel in (
        ("gemm_w8a8", many.w8a8_kernel),
        ("gemm_w4a8", many.w4a8_kernel),
        ("gemm_w4a8_per_group", many.w4a8_per_group_kernel),
    )
}
COPIES = {
    "w4_expand": OfflineKernel(
        (Problem(4608),), tuning.row_config, rows.w4_expand_kernel, {"packed_ptr": "*u8", "out_ptr": "*i8"}
    ),
    "transpose_v": OfflineKernel(
        HEADS[::2], attention.transpose_config, attention.transpose_kernel, {"v_ptr": "*i8"}
    ),
}
STAGED_GEMMS = {
    f"{gemm}+{stages}": OfflineKernel(
        ASYMMETRIC if stages == "asymmetric" else GEMMS[:2], epilogue.tiles_of, kernel,
        epilogue.OUTPUTS.get(stages, {}), DISTINCT if stages == "asymmetric" else None,
    )
    for gemm, kernel, those in (
        ("gemm_w8a8", gemms.w8a8_kernel, epilogue.STAGES),
        ("gemm_w4a8", gemms.w4a8_kernel, epilogue.STAGES),
        ("gemm_w4a8_per_group", gemms.w4a8_per_group_kernel, epilogue.STAGES),
    )
    for stages in those
}
ATTENTIONS = {
    op: OfflineKernel(
        HEADS, attention.config_of, attention.attention_kernel, attention.types_of(op),
        checked=2,  # long rows and short ones
    )
    for op in attention.OPS
}  # fmt: skip
SHARED_TILES = {
    f"{gemm}+split_k": OfflineKernel(FEW_TOKENS, variants.split_tiles, variants.split(kernel), variants.SUMS)
    for gemm, kernel in (("gemm_w8a8", gemms.w8a8_kernel), ("gemm_w4a8", gemms.w4a8_kernel))
} | {
    "split_k_reduce": OfflineKernel(
        FEW_TOKENS, variants.reduce_rows, variants.reduce_kernel, {"sums_ptr": "*i32"}
    )
}
PERSISTENT = {
    f"gemm_w8a8+{variant}": OfflineKernel(
        GEMMS[:1], variants.persistent_tiles, variants.persistent(gemms.w8a8_kernel), targets=targets
    )
    for variant, (_, _, targets) in variants.PERSISTENT.items()
}
KERNELS = ROW_KERNELS | PLAIN_GEMMS | MANY | COPIES | STAGED_GEMMS | ATTENTIONS | SHARED_TILES | PERSISTENT

"""Which of diffusers' tests do not apply to a model in integers, and why: a pattern of their name, the reason."""

from __future__ import annotations

NOT_APPLICABLE: tuple[tuple[str, str], ...] = (
    (
        r"::test_from_save_pretrained_dtype\[|::test_from_pretrained_dtype_alias|::test_keep_in_fp32"
        r"|::test_lora_layerwise_casting",
        "diffusers refuses .to(dtype) and .half() of any quantized model, and scales stay fp32",
    ),
    (
        r"Training|::test_training|::test_quantization_training|test_layerwise_casting_training",
        "integer weights are not trained: backward through them is refused by name",
    ),
    (
        r"::test_quantized_layers",
        "it asks for every linear; those outside of the blocks stay float on purpose",
    ),
    (
        r"DitqPixArt::test_quantization_memory_footprint",
        "at the few channels of this tiny model scales and biases weigh as much as codes",
    ),
    (
        r"::test_original_dtype",
        "ditq keeps the dtype for itself: told of one, diffusers would cast its fp32 scales",
    ),
    (r"::test_fuse_unfuse_qkv", "fuse_qkv_projections is refused by name"),
    (r"\[dora\]", "DoRA reads the float weight, and is refused by name"),
    (r"::test_lora_fuse_nan", "fuse_lora is refused by name"),
    (
        r"SingleFile|remapping_from_pretrained_config|::test_correct_class_remapping$",
        "it downloads a checkpoint of diffusers",
    ),
    (
        r"BitsAndBytes|Quanto|TorchAo|GGUF|ModelOpt|SDNQ|AutoRound|Nunchaku",
        "it is of another quantizer",
    ),
)

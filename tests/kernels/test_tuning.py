"""Launch tables: complete, well-formed, looked up in order."""

import pytest
import torch

from ditq_kernels.launch import backend, tuning

ARCHITECTURES = ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_120", "sm_121"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 512, 2048, 10**6])
@pytest.mark.parametrize("in_features", [64, 1152, 4608, 100_000])
def test_every_shape_has_a_launch(architecture, num_tokens, in_features):
    tables = tuning.tables_of_architecture(architecture)
    # run the tiles of the next two, and of the quantizers
    fused = {"gemm_residual", "gemm_gelu_quantize", "gemm_qkv_quantize", "gelu_quantize"}
    fused |= {"quantize_heads", "gemm_many"}  # have no table
    for op in backend.TRITON_OPS - fused | {"gemm_w8a8_epilogue", "gemm_w4a8_epilogue"}:
        choose = tuning.row_config if "quantize" in op or op == "w4_expand" else tuning.tile_config
        if op.startswith("attention"):
            choose = tuning.attention_config
        config = choose(op, tables, num_tokens, in_features)
        sizes = {name: v for name, v in vars(config).items() if name not in tuning.UNSAID}
        assert all(
            v >= 1 and (v & (v - 1) == 0 or name == "num_stages") for name, v in sizes.items()
        )


@pytest.mark.parametrize("architecture", ["interpreter", "sm_80", "sm_89", "sm_90"])
def test_variants_are_asked_for_only_where_they_exist(architecture):
    for op, rows in tuning.load_table(architecture)["ops"].items():
        fields = {name for row in rows for name in row} & set(tuning.UNSAID)
        known = {"split_k"} if op.startswith(("gemm_w8a8", "gemm_w4a8")) else set()
        known = set() if "per_group" in op else known
        assert fields <= known | ({"parts"} if op.endswith("_epilogue") else set()), op


def test_a_launch_in_words():
    words = tuning.launch_text
    plain = tuning.TileConfig(128, 256, 64, 8, 3, split_k="auto")
    assert words(vars(plain)) == "128x256x64, 8 warps, 3 stages"
    other = tuning.TileConfig(128, 128, 128, 4, 3, 2, 1, "tma", specialize=True, parts=4)
    assert words(vars(other)).endswith("3 stages, split 2, persistent 1, tma, specialized, 4 parts")
    assert words(vars(tuning.TileConfig(64, 64, 64, 4, 3, 1, 2, flatten=False))).endswith(
        "2, two loops"
    )
    assert words(vars(tuning.RowConfig(4, 8))) == "4, 8 warps"


def test_a_table_for_some_ops_comes_before_the_one_it_borrows():
    assert tuning.tables_of_architecture("sm_121") == ("sm_120", "sm_89")
    tables = tuning.tables_of_architecture("sm_120")
    spilling = tuning.attention_config("attention_qk_int8_pv_int8", ("sm_89",), 256, 72)
    own = tuning.attention_config("attention_qk_int8_pv_int8", tables, 256, 72)
    assert (spilling.block_k, own.block_k) == (128, 64)
    assert tuning.tile_config("gemm_w8a8", tables, 8192, 1152) == tuning.tile_config(
        "gemm_w8a8", ("sm_89",), 8192, 1152
    )


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_120"])
def test_untimed_tables_say_so(architecture):
    assert "untimed" in tuning.load_table(architecture)["provenance"]


def test_the_gpu_s_own_table_comes_first(monkeypatch):
    own = {
        "ops": {
            "gemm_w8a8": [
                {"block_t": 1, "block_n": 2, "block_k": 4, "num_warps": 8, "num_stages": 16}
            ]
        }
    }
    load = tuning.load_table
    monkeypatch.setattr(
        tuning, "load_table", lambda name: own if name == "NVIDIA_X" else load(name)
    )
    tables = tuning.tables_of_architecture("sm_90", "NVIDIA_X")
    assert tables == ("NVIDIA_X", "sm_90")
    assert tuning.tile_config("gemm_w8a8", tables, 8192, 1152) == tuning.TileConfig(1, 2, 4, 8, 16)
    assert tuning.row_config("quantize_static", tables, 8192, 1152)  # falls through to sm_90


def test_an_unknown_gpu_is_refused():
    tables = tuning.tables_of_architecture("sm_75")
    with pytest.raises(NotImplementedError, match="gemm_w8a8: no launch table covers this GPU"):
        tuning.tile_config("gemm_w8a8", tables, 8192, 1152)


def test_cpu_tensors_get_interpreter_tiles():
    assert tuning.tables_of(torch.device("cpu")) == ("interpreter",)

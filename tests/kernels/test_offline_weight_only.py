"""Machine code of the weight-only linears, compiled without a GPU."""

import json

import pytest

OPS = ["linear_w8", "linear_w4"]


@pytest.mark.parametrize("target", [80, 89, 90])
def test_products_run_on_bf16_tensor_cores_without_spills(target, python_without_interpreter):
    program = (
        "import dataclasses, json; from ditq_kernels._triton.offline import compile as offline;"
        f"found = offline.compile_ops({target}, [(op, dict(num_tokens=16)) for op in {OPS}]);"
        "print(json.dumps([dataclasses.asdict(c) for c in found]))"
    )
    for census in json.loads(python_without_interpreter("-c", program)):
        assert (census["stack"], census["spills"]) == (0, 0), census["op"]
        assert all("BF16" in name for name in census["mma"])
        config = census["config"]
        depth = 64 if census["op"] == "linear_w4" else config["block_k"]  # groups of 64
        products = 3 * (config["block_n"] // 8) * (depth // 16) // config["num_warps"]
        assert census["loop"]["HMMA"] == products  # three parts of an fp32 input, no more
        assert not {"F2I", "FFMA"} & set(census["loop"])

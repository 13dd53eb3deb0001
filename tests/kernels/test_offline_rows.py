"""Machine code of fused row quantizers, compiled without a GPU."""

import json

import pytest

OPS = [
    f"{before}_quantize_{scale}"
    for before in ("adaln", "gelu")
    for scale in ("per_token", "static")
]
BUDGET = {  # whole kernel, 4 rows of 1152 by 4 warps; seen with Triton 3.6.0, plus 5 %
    "adaln_quantize_per_token": 1180, "adaln_quantize_static": 1140,
    # GELU runs twice: Triton repeats it for the wider layout of the stored codes, instead of moving its result
    "gelu_quantize_per_token": 1680, "gelu_quantize_static": 1020,
}  # fmt: skip


@pytest.fixture(scope="module", params=[80, 89, 90])
def censuses(request, python_without_interpreter):
    """Census of each op for one target, from one process without the interpreter."""
    program = (
        "import dataclasses, json; from ditq_kernels._triton.offline import compile as offline;"
        f"shape = dict(num_tokens=8192, in_features=1152);"
        f"found = offline.compile_ops({request.param}, [(op, shape) for op in {OPS}]);"
        "print(json.dumps({c.op: dataclasses.asdict(c) for c in found}))"
    )
    return json.loads(python_without_interpreter("-c", program))


def test_nothing_spills(censuses):
    for op, census in censuses.items():
        assert (census["stack"], census["spills"]) == (0, 0), op
        assert census["registers"] <= 128  # four programs on a multiprocessor


def test_rounding_needs_no_conversion(censuses):
    """F2I, I2F: a division for the sample's index, the width, the zero point, never one an element (36 a thread)."""
    for op, census in censuses.items():
        assert census["whole"].get("F2I", 0) <= 1, op
        assert census["whole"].get("I2F", 0) <= 4, op


def test_rows_stay_within_their_budget(censuses):
    for op, census in censuses.items():
        assert sum(census["whole"].values()) <= BUDGET[op], op

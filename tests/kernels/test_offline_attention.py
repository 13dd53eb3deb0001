"""Machine code of the default attention launches, compiled without a GPU.

Counts are instructions per warp and score of one look at the keys or of the second of two (64 or 32 scores a
thread), seen with Triton 3.6.0 and 3.7.1 and scales per token; the budgets leave about 5 %.
"""

import json
import math

import pytest

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
PRODUCTS = {80: ("IMMA.16832.S8.S8", "HMMA.16816.F32.BF16"), 90: ("IGMMA", "HGMMA")}
PRODUCTS[89] = PRODUCTS[80]
INT8, BF16 = "attention_qk_int8_pv_int8", "attention_qk_int8_pv_bf16"
STRICT = "+strict"
# keys of one tile and of several, head dimensions of one part and of two
CASES = [(keys, head_dim) for keys in (256, 1024) for head_dim in (64, 72)]
BUDGET = {  # instructions a score, by op, head dimension, keys a tile
    (INT8 + STRICT, 64, 64): 13.0, (INT8 + STRICT, 72, 64): 14.2,
    (INT8 + STRICT, 64, 128): 11.2, (INT8 + STRICT, 72, 128): 12.2,
    (BF16 + STRICT, 64, 64): 11.8, (BF16 + STRICT, 72, 64): 13.2,
    (BF16 + STRICT, 64, 128): 9.4, (BF16 + STRICT, 72, 128): 10.6,
    (INT8, 64, 64): 17.0, (INT8, 72, 64): 19.0, (INT8, 64, 128): 13.4, (INT8, 72, 128): 14.6,
    (BF16, 64, 64): 13.5, (BF16, 72, 64): 15.2, (BF16, 64, 128): 10.8, (BF16, 72, 128): 11.9,
}  # fmt: skip


@pytest.fixture(scope="module", params=[80, 89, 90])
def censuses(request, python_without_interpreter):
    """Census of each op and case for one target, from one process without the interpreter."""
    program = (
        "import dataclasses, json; from ditq_kernels._triton.offline import compile as offline;"
        f"cases = [(op, keys, d) for op in {(INT8, BF16, INT8 + STRICT, BF16 + STRICT)} for keys, d in {CASES}];"
        f"found = offline.compile_ops({request.param}, [(op, dict(num_tokens=keys, in_features=d, zero_point=True))"
        " for op, keys, d in cases]);"
        "print(json.dumps([[case, dataclasses.asdict(c)] for case, c in zip(cases, found)]))"
    )
    printed = python_without_interpreter("-c", program)
    return request.param, {tuple(case): census for case, census in json.loads(printed)}


def test_nothing_spills(censuses):
    target, found = censuses
    for case, census in found.items():
        assert (census["stack"], census["spills"]) == (0, 0), case
        assert census["registers"] <= 255
        assert census["shared"] <= SHARED_LIMIT[target]


def test_scores_and_int8_values_run_on_int8_tensor_cores(censuses):
    target, found = censuses
    integer, floating = PRODUCTS[target]
    for (op, *_), census in found.items():
        names = set(census["mma"])
        assert any(name.startswith(integer) for name in names)
        assert any(name.startswith(floating) for name in names) == op.startswith(BF16)
        assert all(name.startswith((integer, floating)) for name in names)
        assert all("S8.S8" in name for name in names if name.startswith(integer))


def test_products_are_not_padded_to_128(censuses):
    """72 is 64 + 32 in each look at the keys and 64 + 16 for values."""
    _, found = censuses
    for op, keys in ((INT8, 256), (INT8, 1024), (INT8 + STRICT, 1024)):
        padded, plain = (found[op, keys, d] for d in (72, 64))
        looks = 2 if op.endswith(STRICT) else 1
        expected = needed(padded["config"], looks, 96, 80) / needed(plain["config"], looks, 64, 64)
        assert products(padded["mma"]) / products(plain["mma"]) == expected


def needed(config, looks, score, value):
    """Multiplications of a warp for one tile, in one look at the keys or two."""
    return config["block_q"] * config["block_k"] / config["num_warps"] * (looks * score + value)


def products(mma):
    """Multiplications of all instructions, from names such as IMMA.16832.S8 and IGMMA.64x128x32.S8."""
    sizes = {name: name.split(".")[1].replace("16832", "16x8x32").split("x") for name in mma}
    return sum(count * math.prod(map(int, sizes[name])) for name, count in mma.items())


def test_the_last_look_stays_lean(censuses):
    _, found = censuses
    for (op, keys, head_dim), census in found.items():
        if keys == 256:
            continue
        loop, config = census["loop"], census["config"]
        assert not {"F2I", "LDL", "STL"} & set(loop)
        # loads are asynchronous, but for the sums of a tile's values, which are needed only after its exponentials
        assert loop.get("LDG", 0) <= (10 if op == INT8 else 0), (op, loop.get("LDG"))
        assert loop["LDGSTS"] >= 3
        scores = config["block_q"] * config["block_k"] / (32 * config["num_warps"])
        assert sum(loop.values()) <= BUDGET[op, head_dim, config["block_k"]] * scores, loop
        # one exp2 a score, without care for denormals, and one for each of a thread's rows
        assert loop["MUFU"] <= scores + 4


def test_only_the_rounding_is_fused(censuses):
    _, found = censuses
    for (op, keys, head_dim), census in found.items():
        if keys == 1024:
            scores = census["config"]["block_q"] * census["config"]["block_k"]
            per_thread = scores // (32 * census["config"]["num_warps"])
            # one rounding a code; with one look, one for each sum and its rescaling, too
            rows, sums = (
                2,
                census["config"]["block_q"]
                * (64 if head_dim == 64 else 80)
                // (32 * census["config"]["num_warps"]),
            )
            expected = {INT8: per_thread + sums + rows, INT8 + STRICT: per_thread}
            assert census["loop"].get("FFMA", 0) == expected.get(op, 0)

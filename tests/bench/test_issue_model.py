"""The static model against numbers worked by hand from datasheets and instruction shapes."""

import pytest

from ditq_bench.census.issue_model import MACHINES, mma_clocks, occupancy, predict


def census(target, warps, loop, registers=128, shared=48 << 10):
    return {
        "target": target, "config": {"num_warps": warps}, "registers": registers, "shared": shared,
        "loop_opcodes": loop, "whole_opcodes": loop,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "clocks"),
    # a 128 x 128 x 64 tile: 64 instructions in each of 4 warps, 8 clocks each on a quarter of an A100,
    # 16 on Ada
    [(80, 64 * 8), (86, 64 * 16), (89, 64 * 16), (120, 64 * 16)],
)
def test_legacy_products(target, clocks):
    assert mma_clocks({"IMMA.16832.S8.S8.SAT": 64}, 4, MACHINES[target]) == clocks


def test_warp_group_products_are_counted_once_for_four_warps():
    loop = {"IGMMA.64x128x32.S8.S8": 8}
    assert mma_clocks(loop, 4, MACHINES[90]) == 128 * 128 * 128 / 4096
    assert mma_clocks(loop, 8, MACHINES[90]) == 128 * 256 * 128 / 4096
    assert mma_clocks({"HGMMA.64x64x16.F32.BF16": 4}, 4, MACHINES[90]) == 64 * 64 * 64 / 2048


def test_issue_share_of_a_known_loop():
    """142 instructions beside 64 products: 28 % on an A100, half of that on Ada."""
    loop = {"IMMA.16832.S8.S8.SAT": 64, "IADD3": 78}
    assert predict(census(80, 4, loop)).issue_share == pytest.approx(142 / 512)
    assert predict(census(89, 4, loop)).issue_share == pytest.approx(142 / 1024)
    assert predict(census(80, 4, loop)).limiter == "mma"


@pytest.mark.parametrize(
    ("extra", "limiter"),
    [
        ({"IADD3": 600}, "issue"),  # 600 clocks of 4 schedulers against 512
        ({"MUFU": 80}, "special"),  # 80 x 8 clocks
        ({"I2F": 40, "F2I": 40}, "special"),
        ({"LDSM.16.M88.4": 40}, "memory"),  # 40 x 4 warps x 512 bytes / 128
        ({"LDGSTS.E.BYPASS.LTC128B.128": 20}, "memory"),  # 20 x 4 x 512 / 64
        ({"I2FP": 80, "IADD3": 60}, "mma"),  # an ordinary instruction where it exists
    ],
)
def test_each_unit_can_be_the_limiter(extra, limiter):
    assert predict(census(80, 4, {"IMMA.16832.S8.S8.SAT": 64, **extra})).limiter == limiter


def test_element_wise_kernels_are_held_against_device_memory():
    # 16 bytes a lane: 2048 bytes of a program against 4 instructions
    prediction = predict(census(90, 4, {"LDG.E.128": 1, "FADD": 3}))
    assert prediction.clocks["issue"] == 4
    assert prediction.clocks["memory"] == pytest.approx(2048 / (4.8e12 / 132 / 1.83e9))
    assert prediction.issue_share is None
    wide, narrow = ({name: 1} for name in ("STG.E.U8", "STG.E"))
    assert predict(census(90, 4, narrow)).clocks["memory"] == pytest.approx(
        4 * predict(census(90, 4, wide)).clocks["memory"]
    )


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (214, 49152, 8, (1, "registers")),  # 216 x 256 = 55296 of 65536
        (128, 49152, 4, (3, "shared")),  # 3 x 49 KiB of 164
        (32, 0, 16, (4, "registers")),
        (24, 0, 32, (2, "registers")),  # 24 x 1024 = 24576
        (24, 0, 1, (32, "programs")),
    ],
)
def test_occupancy_on_an_a100(registers, shared, warps, expected):
    assert occupancy(registers, shared, warps, MACHINES[80]) == expected


def test_no_rate_is_invented_for_blackwell():
    prediction = predict(census(100, 4, {"IMMA.16832.S8.S8.SAT": 64}))
    assert "mma" not in prediction.clocks
    assert prediction.issue_share is None

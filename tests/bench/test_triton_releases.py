"""The releases whose machine code is checked are the ends of what the package accepts."""

from pathlib import Path

from ditq_bench.census.rows import TARGETS, gated_cases, gated_targets, kernel_names
from ditq_kernels.launch.gpus import FIRST_TRITON, release_of

ROOT = Path(__file__).parents[2]


def test_the_oldest_is_the_first_that_installs_and_runs(triton_releases):
    dependencies = (ROOT / "pyproject.toml").read_text()
    oldest = release_of(triton_releases[0])
    assert f"triton>={oldest[0]}.{oldest[1]};" in dependencies
    assert oldest == FIRST_TRITON


def test_the_pinned_one_lies_between(triton_releases):
    (line,) = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("triton==")
    ]
    pinned = release_of(line.removeprefix("triton=="))
    assert release_of(triton_releases[0]) <= pinned <= release_of(triton_releases[-1])


def test_sm_100_is_checked_where_all_kernels_have_its_products():
    assert gated_targets("3.6.0") == gated_targets("3.8.0") == TARGETS
    assert gated_targets("3.9.0") == (*TARGETS, 100)


def test_the_gate_takes_all_kernels_but_on_the_newest_gpus_those_with_stages():
    found = {case[:2] for case in gated_cases(kernel_names(), "3.9.0")}
    plain = {kernel for kernel in kernel_names() if "+" not in kernel}
    assert {kernel for kernel, target in found if target == 100} == plain
    assert {kernel for kernel, target in found if target == 120} == plain
    assert {kernel for kernel, target in found if target == 90} == set(kernel_names())
    assert {"gemm_w8a8", "gemm_w4a8", "attention_qk_int8_pv_int8"} < plain

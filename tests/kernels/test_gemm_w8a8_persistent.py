"""Programs that stay, and loads by TMA, leave the bits of the plain kernel."""

import os
from dataclasses import replace

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import gemm_residual, gemm_w8a8, gemm_w8a8_persistent
from ditq_kernels.launch import waves
from ditq_kernels.launch.tuning import TileConfig
from ditq_kernels.reference import linear as reference

PLAIN = TileConfig(32, 32, 64, 4, 2)
ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"
VARIANTS = [
    {"programs_per_sm": 1},
    {"programs_per_sm": 2},
    {"loads": "tma"},
    {"loads": "tma", "programs_per_sm": 1},
    {"loads": "tma", "programs_per_sm": 1, "specialize": True},
]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def two_multiprocessors(monkeypatch):
    """So few that a program has several tiles."""
    monkeypatch.setattr(waves, "gpu_of", lambda device: waves.Gpu(2, 4096))


def operands(tokens, outputs, inputs, generator, device):
    q, weight = (
        torch.randint(-128, 128, (rows, inputs), generator=generator, dtype=torch.int8)
        for rows in (tokens, outputs)
    )
    scale, weight_scale = (torch.rand(n, generator=generator) / 100 for n in (tokens, outputs))
    bias = torch.randn(outputs, generator=generator)
    return [v.to(device) for v in (q, weight, scale, weight_scale, bias)]


def runs_here(fields):
    return not (
        ON_GPU and fields.get("loads") == "tma" and torch.cuda.get_device_capability() < (9, 0)
    )


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(70, 40, 96), (1, 1, 16)])
def test_bits_of_the_reference(fields, tokens, outputs, inputs, generator, device):
    if not runs_here(fields):
        pytest.skip("TMA needs sm_90")
    q, weight, scale, weight_scale, bias = operands(tokens, outputs, inputs, generator, device)
    got = gemm_w8a8.launch(
        q,
        weight,
        scale,
        weight_scale,
        bias,
        None,
        None,
        torch.float32,
        config=replace(PLAIN, **fields),
    )
    on_cpu = [v.cpu() for v in (q, weight, scale, weight_scale, bias)]
    assert torch.equal(got.cpu(), k.gemm_w8a8(*on_cpu))


def test_stages_of_the_epilogue(generator, device):
    q, weight, scale, weight_scale, bias = operands(40, 41, 96, generator, device)
    stream = torch.randn(40, 41, generator=generator).bfloat16().to(device)
    gate = torch.randn(5, 41, generator=generator).to(device)
    stages = (scale, weight_scale, bias, None, None, None, None, None)
    outputs = [
        gemm_residual.launch(q, weight, None, None, stream, gate, *stages, config=config)
        for config in (PLAIN, replace(PLAIN, programs_per_sm=1))
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("tiles", "per_sm", "programs"), [(100, 0, 100), (100, 1, 2), (100, 3, 6), (3, 2, 3)]
)
def test_programs(tiles, per_sm, programs):
    config = replace(PLAIN, programs_per_sm=per_sm)
    assert gemm_w8a8_persistent.programs_of(config, torch.device("cpu"), tiles) == programs


def test_warps_are_specialized_only_where_the_compiler_can():
    config = replace(PLAIN, **VARIANTS[-1])
    alone, with_low_rank = (gemm_w8a8_persistent.schedule(config, two) for two in (False, True))
    assert alone == {"TMA": True, "FLATTEN": False, "SPECIALIZE": True}
    assert with_low_rank == {"TMA": True, "FLATTEN": True, "SPECIALIZE": False}


def test_rows_that_tma_cannot_read_are_refused(generator, device):
    q, weight, scale, weight_scale, bias = operands(4, 4, 24, generator, device)
    with pytest.raises(ValueError, match="TMA needs rows at multiples of 16 bytes"):
        gemm_w8a8.launch(
            q, weight, scale, weight_scale, bias, None, None, torch.float32,
            config=replace(PLAIN, loads="tma"),
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("fields", VARIANTS[:4], ids=str)
@pytest.mark.parametrize("tile", [(128, 128, 64, 8, 3), (128, 128, 128, 8, 3)])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(512, 4608, 1152), (1000, 1000, 1008)])
def test_on_a_gpu(fields, tile, tokens, outputs, inputs, generator, device):
    if not runs_here(fields):
        pytest.skip("TMA needs sm_90")
    arguments = operands(tokens, outputs, inputs, generator, device)
    tail = (None, None, torch.float32)
    config = replace(TileConfig(*tile), **fields)
    expected = reference.gemm_w8a8(*arguments, *tail)
    assert torch.equal(gemm_w8a8.launch(*arguments, *tail, config=config), expected)

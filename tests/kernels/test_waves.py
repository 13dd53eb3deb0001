"""The wave model against numbers worked by hand, and who asks it."""

import pytest
import torch

from ditq_kernels._triton.parts import split_k
from ditq_kernels.launch import tuning, waves

H200, RTX_4090 = waves.Gpu(132, 4096), waves.Gpu(128, 1024)
FC2 = waves.Work(512, 4608, 1152, 128, 128, 128)  # DiT-XL/2, 256 pixels, one guided image


def test_tiles_and_iterations():
    assert (FC2.tiles, FC2.iterations) == (4 * 9, 36)
    assert waves.Work(513, 4609, 1153, 128, 128, 128).tiles == 5 * 10


# loads: 256 x 128 bytes at 64 a clock are 512 clocks, and so are 128**3 products at 4096 a clock
@pytest.mark.parametrize(
    ("splits", "clocks"),
    [
        (1, 36 * 512),  # 36 programs, one wave
        (2, 18 * 512 + 3600 + 8 * 2 * 512 * 1152 / (64 * 132)),  # 72 programs, one wave
        (3, 12 * 512 + 3600 + 8 * 3 * 512 * 1152 / (64 * 132)),  # 108 programs, one wave
        (4, 2 * 9 * 512 + 3600 + 8 * 4 * 512 * 1152 / (64 * 132)),  # 144 programs, two waves
    ],
)
def test_clocks_by_hand(splits, clocks):
    assert waves.clocks(FC2, splits, H200) == pytest.approx(clocks, rel=1e-12)


def test_products_bind_on_a_slower_tensor_core():
    # 128**3 / 1024 = 2048 clocks against 512 of loads; 36 of 128 multiprocessors
    assert waves.clocks(FC2, 1, RTX_4090) == 36 * 2048


@pytest.mark.parametrize(
    ("work", "splits"),
    [
        (FC2, 3),
        (
            waves.Work(512, 1152, 1152, 128, 128, 128),
            1,
        ),  # o_proj: 9 iterations do not pay a second launch
        (waves.Work(512, 1152, 4608, 128, 128, 128), 1),  # fc1: 144 tiles
        (waves.Work(8192, 4608, 1152, 128, 256, 128), 1),  # 16 images
        (waves.Work(512, 4608, 2048, 64, 128, 128), 1),  # 128 tiles: more than 0.7 of 132
        (waves.Work(64, 100, 64, 64, 64, 128), 1),  # one iteration has nothing to share
    ],
)
def test_splits_where_the_model_says_so(work, splits):
    assert waves.best_splits(work, H200) == splits
    assert waves.best_splits(work, None) == 1


def test_a_gain_within_the_model_s_error_is_left_alone():
    """A100, o_proj in tiles of 128x128x64: 18 x 512 clocks; three programs a tile: 6 x 512 + 3600 + 2048, 5 % less."""
    work, a100 = waves.Work(512, 1152, 1152, 128, 128, 64), waves.Gpu(108, 2048)
    assert waves.clocks(work, 1, a100) == 9216
    assert waves.clocks(work, 3, a100) == pytest.approx(6 * 512 + 3600 + 2048)
    assert waves.best_splits(work, a100) == 1


def test_auto_asks_the_model_and_a_number_does_not(monkeypatch):
    monkeypatch.setattr(waves, "gpu_of", lambda device: H200)
    sizes = (torch.device("cpu"), 512, 4608, 1152)
    auto = tuning.TileConfig(128, 128, 128, 8, 3, split_k="auto")
    assert split_k.splits_of(auto, *sizes) == 3
    assert split_k.splits_of(tuning.TileConfig(128, 128, 128, 8, 3, split_k=2), *sizes) == 2
    assert split_k.splits_of(tuning.TileConfig(128, 128, 128, 8, 3), *sizes) == 1


def test_a_cpu_is_an_unknown_gpu():
    assert waves.gpu_of(torch.device("cpu")) is None

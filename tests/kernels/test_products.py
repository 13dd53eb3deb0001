"""Products of fp32 stay IEEE whatever is set, and what was set comes back."""

import threading

import pytest
import torch

import ditq_kernels as k
from ditq_kernels.codes.products import SETTINGS, ieee, ieee_product, is_ieee
from ditq_runtime.surroundings import steady

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def asked():
    return SETTINGS["cpu"].asked()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_weight_only_layers_do_not_obey(precision):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 128, generator=generator)
    weight = torch.randint(-127, 128, (768, 128), dtype=torch.int8, generator=generator)
    scale, down = torch.rand(768, generator=generator), torch.randn(16, 128, generator=generator)
    codes = torch.randint(-127, 128, (64, 128), dtype=torch.int8, generator=generator)
    step = torch.rand(64, generator=generator)

    def run():
        return k.linear_w8(x, weight, scale), k.lora_down(codes, down.bfloat16(), step)

    expected = run()
    torch.set_float32_matmul_precision(precision)
    for found, truth in zip(run(), expected, strict=True):
        assert torch.equal(found, truth)
    assert torch.get_float32_matmul_precision() == precision


def test_an_inherited_setting_stays_inherited():
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "bf16"  # where torch.get_float32_matmul_precision() raises
    with steady():
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert not is_ieee(CPU)  # what the caller wants: another thread may be on its way out
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_what_is_set_meanwhile_stays():
    torch.set_float32_matmul_precision("medium")
    with ieee(CPU):
        torch.set_float32_matmul_precision("high")
    assert torch.get_float32_matmul_precision() == "high"


def test_the_last_of_several_threads_puts_it_back():
    torch.set_float32_matmul_precision("medium")
    x, weight = torch.randn(1, 128), torch.randn(768, 128)
    with steady():
        truth = x @ weight.t()
    wrong = []

    def repeat():
        for _ in range(200):
            wrong.extend([1] * (not torch.equal(ieee_product(x, weight), truth)))

    threads = [threading.Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, asked(), torch.get_float32_matmul_precision()) == ([], "bf16", "medium")

"""Which GPUs and Triton releases are refused."""

import pytest
import torch

from ditq_kernels._triton.parts.versions import check_versions
from ditq_kernels.launch import backend, gpus, tuning


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.7.0+git1234", "3.8.0", "3.9.1+cu130"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)])
def test_supported_releases_run(capability, version):
    check_versions(capability, version)


@pytest.mark.parametrize("version", ["3.5.1", "2.1.0", "unknown"])
def test_old_releases_are_refused(version):
    with pytest.raises(NotImplementedError, match=f"3.6 or newer is needed, got {version}"):
        check_versions((9, 0), version)


def test_old_gpus_are_refused():
    with pytest.raises(NotImplementedError, match="sm_80 GPU or newer, got sm_75"):
        check_versions((7, 5), "3.6.0")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU of a capability, as far as torch tells."""

    def of(*capability):
        tuning.tables_of.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")

    yield of
    tuning.tables_of.cache_clear()


@pytest.mark.parametrize(
    ("capability", "sentence"),
    [
        ((7, 5), "int8 kernels need an sm_80 GPU or newer, got sm_75"),
        ((6, 1), "int8 kernels need an sm_80 GPU or newer, got sm_61"),
        ((10, 0), "Triton 3.9 or newer is needed on an sm_100"),
        ((10, 3), "Triton 3.9 or newer is needed on an sm_103"),
    ],
)
@pytest.mark.parametrize("newest", [False, True])
def test_the_backend_is_refused_before_a_launch(gpu, monkeypatch, capability, sentence, newest):
    gpu(*capability)
    triton = "3.9.0" if newest else "3.8.0"
    monkeypatch.setattr("ditq_kernels.launch.gpus.metadata.version", lambda name: triton)
    if newest and capability[0] == 10:
        sentence = f"no launch table covers this GPU, an sm_{capability[0]}{capability[1]}"
    assert sentence in gpus.why_device_refused(torch.device("cuda", 0))
    with pytest.raises(ValueError, match=f"'triton' does not run here: {sentence}"):
        backend.choose_backend("triton", "cuda")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (12, 0), (12, 1)])
def test_served_gpus_are_not_refused(gpu, capability):
    gpu(*capability)
    assert gpus.why_device_refused(torch.device("cuda", 0)) == ""
    assert backend.why_not("triton", "cuda") == ""

"""Which GPUs and Triton releases are refused."""

import pytest

from ditq_kernels._triton.parts.versions import check_versions


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.7.0+git1234", "3.8.0", "3.9.1+cu130"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_supported_releases_run(capability, version):
    check_versions(capability, version)


@pytest.mark.parametrize("version", ["3.5.1", "2.1.0", "unknown"])
def test_old_releases_are_refused(version):
    with pytest.raises(NotImplementedError, match=f"3.6 or newer is needed, got {version}"):
        check_versions((9, 0), version)


def test_old_gpus_are_refused():
    with pytest.raises(NotImplementedError, match="sm_80 GPU or newer, got sm_75"):
        check_versions((7, 5), "3.6.0")

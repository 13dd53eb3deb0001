"""Which GPUs and Triton releases are refused."""

import pytest

from ditq_kernels._triton.versions import check_versions


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.7.0+git1234"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_clean_releases_run(capability, version):
    check_versions(capability, version)


@pytest.mark.parametrize("version", ["3.8.0", "3.9.0", "3.9.1+cu130"])
@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_89")]
)
def test_the_int8_regression_is_refused_on_sm_8x(capability, name, version):
    with pytest.raises(
        NotImplementedError, match=rf"Triton {version[:3]}.*{name}.*install triton>=3.6"
    ):
        check_versions(capability, version)


@pytest.mark.parametrize("version", ["3.8.0", "3.9.0"])
def test_hopper_takes_them(version):
    check_versions((9, 0), version)


@pytest.mark.parametrize("version", ["3.5.1", "2.1.0", "unknown"])
def test_old_releases_are_refused(version):
    with pytest.raises(NotImplementedError, match=f"3.6 or newer is needed, got {version}"):
        check_versions((9, 0), version)


def test_old_gpus_are_refused():
    with pytest.raises(NotImplementedError, match="sm_80 GPU or newer, got sm_75"):
        check_versions((7, 5), "3.6.0")

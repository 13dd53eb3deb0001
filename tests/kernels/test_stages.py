"""The stage hook leaves the prefetch pass out of our kernels on sm_8x, and touches nothing else."""

import threading

import pytest
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend

from ditq_kernels._triton.parts import stages


class Backend:
    """Stands in for Triton's: a stage that asks `passes`, a global of its module, for two passes."""

    @staticmethod
    def make_ttgir(module, metadata, options, capability):
        passes.ttgpuir.add_prefetch(module)
        passes.ttgpuir.add_pipeline(module)
        return module


class passes:
    class ttgpuir:
        add_prefetch = staticmethod(lambda module: module.append("prefetch"))
        add_pipeline = staticmethod(lambda module: module.append("pipeline"))


@pytest.fixture
def hook(monkeypatch):
    """Our hook, installed as a launch does with Triton 3.8."""
    monkeypatch.setattr(stages, "NEEDED", True)
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", None)
    with stages.our_passes():
        pass
    return knobs.runtime.add_stages_inspection_hook


def passes_run(hook, capability):
    """What Triton's compiler would run for a kernel."""
    made = {"ttgir": lambda module, _: Backend.make_ttgir(module, {}, None, capability)}
    hook(Backend, made, None, "triton", capability)
    return made["ttgir"]([], {})


@pytest.mark.parametrize(("capability", "left"), [(80, 1), (86, 1), (89, 1), (90, 2), (100, 2)])
def test_our_kernels_lose_the_pass_on_sm_8x_only(hook, capability, left):
    with stages.our_passes():
        assert passes_run(hook, capability) == ["prefetch", "pipeline"][-left:]


def test_other_kernels_keep_it_and_their_cache_keys(hook):
    assert passes_run(hook, 80) == ["prefetch", "pipeline"]
    assert hook() == ("", "")
    with stages.our_passes():
        assert all(stages.KEY in part for part in hook())
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append((hook(), passes_run(hook, 80))))
        thread.start()
        thread.join()
    assert elsewhere == [(("", ""), ["prefetch", "pipeline"])]
    assert hook() == ("", "")


def test_a_hook_of_somebody_else_still_works(monkeypatch):
    monkeypatch.setattr(stages, "NEEDED", True)
    seen = []

    def theirs(*arguments):
        seen.append(arguments)
        return None if arguments else ("disk", "memory")

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", theirs)
    with stages.our_passes():
        ours = knobs.runtime.add_stages_inspection_hook
        with stages.our_passes():
            assert knobs.runtime.add_stages_inspection_hook is ours  # not wrapped twice
        assert ours()[0] == "disk" + stages.KEY
        assert passes_run(ours, 89) == ["pipeline"]
    assert ours() == ("disk", "memory")
    assert len(seen) == 3


def test_a_release_without_the_pass_is_refused():
    with pytest.raises(NotImplementedError, match=r"prefetch pass out of Triton .*>=3.6,<3.10"):
        stages.without_prefetch(lambda module, metadata, options, capability: module)


def test_the_installed_release_still_has_the_pass():
    ours = stages.without_prefetch(CUDABackend.make_ttgir)
    theirs = CUDABackend.make_ttgir.__globals__["passes"].ttgpuir
    replaced = ours.__globals__["passes"].ttgpuir
    assert replaced.add_prefetch(None) is None  # the real one refuses None
    with pytest.raises(TypeError):
        theirs.add_prefetch(None)
    assert replaced.add_pipeline is theirs.add_pipeline


def test_a_real_kernel_compiles_through_the_hook(python_without_interpreter):
    program = (
        "from ditq_kernels._triton.offline import compile as offline\n"
        "from ditq_kernels._triton.parts import stages; stages.NEEDED = True\n"
        "left_out = []; keep = stages.without_prefetch\n"
        "stages.without_prefetch = lambda stage: left_out.append(stage) or keep(stage)\n"
        "census = offline.compile_op('gemm_w8a8', 80)\n"
        "print(len(left_out), census.spills, census.loop_instructions)"
    )
    printed = python_without_interpreter("-c", program, TRITON_ALWAYS_COMPILE="1")
    left_out, spills, instructions = map(int, printed.split())
    assert (left_out, spills) == (1, 0)
    assert instructions <= 128

"""Int4 weights stand once in memory, in kernel order where a GPU reads them; files and states never change."""

import copy
import pickle
from types import SimpleNamespace

import accelerate
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.hooks import apply_group_offloading

import ditq_runtime as ditq
from ditq_kernels.codes import packing
from ditq_kernels.launch import gpus, tuning
from ditq_runtime.layers import arranged
from ditq_runtime.layers.arranged import NAMES, Arranged, arrange_weights

KINDS = ("w4p_static", "w4p_token", "w4g_static")
FILE = "diffusion_pytorch_model.safetensors"


def groups_of(model):
    """The first tensor of the groups of every linear that kernels multiply in 4 bits."""
    return [
        getattr(m, NAMES[m.format.weights][1])
        for m in model.modules()
        if isinstance(m, Arranged) and m.format.integer_gemm and m.format.weights in NAMES
    ]


def in_kernel_order(model):
    found = {packing.is_arranged(part) for part in groups_of(model)}
    assert len(found) == 1
    return found.pop()


@pytest.fixture(params=KINDS)
def folder(request, packed_folder):
    return packed_folder(request.param)


@pytest.fixture
def with_gpu(monkeypatch):
    """As on a machine with a GPU: what is loaded will be read by kernels."""
    monkeypatch.setattr(arranged, "read_by_kernels", lambda device: True)


@pytest.fixture
def on_gpu(monkeypatch):
    """As on a GPU: kernels read the CPU's tensors; nothing may run."""
    backend_of = lambda op, device: "triton"  # noqa: E731
    monkeypatch.setattr("ditq_kernels.launch.backend.backend_of", backend_of)


def test_without_a_gpu_nothing_moves(folder, load):
    assert not in_kernel_order(load(folder))


@pytest.mark.usefixtures("with_gpu")
def test_files_state_and_results_are_those_of_the_files_order(
    folder, load, forward, tmp_path, take_apart
):
    model = load(folder)
    assert in_kernel_order(model)
    before = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    for module in before.modules():
        if isinstance(module, Arranged):
            module.restore()
    assert not in_kernel_order(before)
    assert torch.equal(forward(model), forward(before))
    state, expected = model.state_dict(), before.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
        assert state[name].is_contiguous()
    assert model.get_memory_footprint() == before.get_memory_footprint()
    model.save_pretrained(tmp_path)
    stored = take_apart(folder / "transformer" / FILE)
    assert take_apart(tmp_path / FILE).entries == stored.entries
    saved = ditq.DitqConfig(**model.load_config(tmp_path)["quantization_config"])
    assert saved.digests
    assert (
        saved.digests
        == ditq.DitqConfig(
            **model.load_config(folder / "transformer")["quantization_config"]
        ).digests
    )


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_is_loaded_in_either_order(folder, load, forward, assign):
    source, model = load(folder), load(folder)
    expected, state = forward(source), source.state_dict()
    with torch.no_grad():
        for part in groups_of(model):
            part.zero_()
    model.load_state_dict(state, assign=assign)
    assert torch.equal(forward(model), expected)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize(
    "travel",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to("cpu"),
        torch.nn.Module.half,
    ],
    ids=["copied", "pickled", "moved", "cast"],
)
def test_what_carries_tensors_carries_their_order(folder, load, travel):
    expected = load(folder).state_dict()
    model = travel(load(folder))
    assert in_kernel_order(model)
    names = [name for name, part in expected.items() if not part.is_floating_point()]
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in names)


@pytest.mark.usefixtures("on_gpu")
def test_what_moves_to_a_gpu_moves_into_order_once(folder, load, monkeypatch):
    calls = []
    arrange = arranged.arrange
    monkeypatch.setattr(
        arranged, "arrange", lambda kind, *parts: calls.append(kind) or arrange(kind, *parts)
    )
    monkeypatch.setattr(arranged, "read_by_kernels", lambda device: False)
    model = load(folder)
    assert not in_kernel_order(model)
    for _ in range(3):
        model.to("cpu")  # which kernels read
    assert in_kernel_order(model)
    assert len(calls) == len(groups_of(model))


@pytest.mark.usefixtures("with_gpu")
def test_offloaded_layer_by_layer_it_runs_as_ever(folder, load, forward):
    """Accelerate takes the weights from the state dictionary, in the file's order, and puts them into the layers."""
    model = load(folder)
    expected = forward(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.transformer_blocks.parameters())
    for _ in range(2):
        assert torch.equal(forward(model), expected)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(forward(model), expected)


@pytest.mark.usefixtures("with_gpu")
def test_offloaded_in_groups_the_arranged_tensors_move(folder, load, forward):
    model = load(folder)
    expected = forward(model)
    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, offload_type="leaf_level")
    assert torch.equal(forward(model), expected)
    assert in_kernel_order(model)


def test_layers_that_no_kernel_reads_in_order_stay(folder, load):
    """Modulation is read in the file's order; int8 has only one."""
    model = load(folder)
    state = {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, Arranged) and not module.format.integer_gemm:
            module.arrange()
    assert state == {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    arrange_weights(model)  # and without a GPU none do
    assert state == {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("capability", "triton", "sentence"),
    [
        ((7, 5), "3.7.1", "ditq: cuda:0: int8 kernels need an sm_80 GPU or newer, got sm_75"),
        ((10, 0), "3.8.0", "ditq: cuda:0: Triton 3.9 or newer is needed on an sm_100"),
        ((10, 3), "3.6.0", "ditq: cuda:0: Triton 3.9 or newer is needed on an sm_103"),
        ((10, 3), "3.9.0", "ditq: cuda:0: no launch table covers this GPU, an sm_103"),
    ],
)
def test_a_gpu_that_cannot_run_it_is_refused_before_a_layer_moves(
    folder, load, monkeypatch, capability, triton, sentence
):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("ditq_kernels.launch.gpus.metadata.version", lambda name: triton)
    gpus.refuse.cache_clear()
    tuning.tables_of.cache_clear()
    model, moved = load(folder), []

    def to_gpu(tensor):
        moved.append(tensor)
        return SimpleNamespace(device=torch.device("cuda:0"), dtype=tensor.dtype)

    layer = model.transformer_blocks[0].attn1.to_q
    with pytest.raises(NotImplementedError, match=rf"^{sentence}"):
        layer._apply(to_gpu)
    assert [tensor.numel() for tensor in moved] == [0]
    monkeypatch.setattr("ditq_kernels.launch.backend._reference_on", {"cuda"})
    arranged.refuse_unserved(torch.device("cuda:0"))  # the reference runs anywhere
    tuning.tables_of.cache_clear()

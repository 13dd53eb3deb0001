"""The host matrix: one test for each thing that users of diffusers expect of a quantized transformer.

A cell runs for ditq, where it must pass, and for torchao and optimum-quanto where these are installed, where the
outcome is only noted. With DITQ_HOST_TABLE=PATH the outcomes are written as the table of docs/host_matrix.md.
"""

import copy
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PipelineQuantizationConfig,
    TensorParallelConfig,
)

import ditq_runtime as ditq
from ditq_converters.demo.identity_vae import build_identity_vae

OUTCOMES = {}  # title -> backend -> outcome
TITLES = []  # of all cells
REFUSED = "refused with a sentence"


def _torchao():
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


def _quanto():
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype="int8")


CONFIGS = {  # distribution -> its configuration for 8-bit weights
    "ditq": lambda: ditq.DitqConfig(weights="w8"),
    "torchao": _torchao,
    "optimum-quanto": _quanto,
}


def _version(backend):
    try:
        return importlib.metadata.version(backend)
    except importlib.metadata.PackageNotFoundError:
        return "source" if backend == "ditq" else None


class Host:
    """What a cell may ask for: models of one backend, and the fixed batches."""

    def __init__(self, backend, floats, packed_folder, tmp_path, cost_of_rounding, cost_of_sums):
        self.backend, self.floats, self.tmp_path = backend, floats, tmp_path
        self.packed_folder, self.cost_of_rounding = packed_folder, cost_of_rounding
        self.cost_of_sums = cost_of_sums

    @property
    def config(self):
        return CONFIGS[self.backend]()

    def load(self, folder=None, **options):
        """A quantized DiT: ditq's from a packed folder, the others' from the float folder."""
        if folder is None and self.backend == "ditq":
            folder = self.packed_folder("w8_static") / "transformer"
        elif folder is None:
            folder = self.floats / "dit" / "transformer"
            options.setdefault("quantization_config", self.config)
        options.setdefault("torch_dtype", torch.float32)  # torchao would take bf16
        return DiTTransformer2DModel.from_pretrained(folder, **options)

    def flux(self):
        """A quantized Flux, for what DiT itself does not support in diffusers."""
        return FluxTransformer2DModel.from_pretrained(
            self.floats / "flux", quantization_config=self.config, torch_dtype=torch.float32
        )

    def run(self, model, dtype=torch.float32, batch=slice(None), timesteps=(10, 900)):
        latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        options = {"timestep": torch.tensor(timesteps), "class_labels": torch.tensor([3, 1000])}
        with torch.no_grad():
            return model(latents[batch], **{k: v[batch] for k, v in options.items()}).sample

    def run_flux(self, model):
        with torch.no_grad():
            return model(**flux_inputs()).sample


def flux_inputs():
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 16, 4, generator=g),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=g),
        "pooled_projections": torch.randn(2, 32, generator=g),
        "timestep": torch.tensor([0.5, 0.25]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }


@pytest.fixture(scope="module")
def floats(pipes, tmp_path_factory):
    """A folder with a float DiT pipeline and a float Flux transformer."""
    folder = tmp_path_factory.mktemp("floats")
    pipes["own"].save_pretrained(folder / "dit")
    torch.manual_seed(0)
    FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).save_pretrained(folder / "flux")  # fmt: skip
    return folder


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if os.environ.get("DITQ_HOST_TABLE"):
        Path(os.environ["DITQ_HOST_TABLE"]).write_text(_table())


def _table():
    backends = {name: _version(name) for name in CONFIGS}
    shown = [name for name in backends if any(name in row for row in OUTCOMES.values())]
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "torch", "peft")
    )
    lines = [f"Measured with {versions}.", ""]
    lines.append("| | " + " | ".join(f"{name} {backends[name]}" for name in shown) + " |")
    lines.append("|---" * (len(shown) + 1) + "|")
    for title, row in OUTCOMES.items():
        lines.append(f"| {title} | " + " | ".join(row.get(name, "") for name in shown) + " |")
    return "\n".join(lines) + "\n"


def cell(title):
    """A test of one cell, for every backend: ditq must pass, what the others do is noted."""

    TITLES.append(title)

    def wrap(check):
        @pytest.mark.parametrize("backend", CONFIGS)
        def test(backend, floats, packed_folder, tmp_path, cost_of_rounding, cost_of_sums):
            if _version(backend) is None:
                pytest.skip(f"{backend} is not installed")
            host = Host(backend, floats, packed_folder, tmp_path, cost_of_rounding, cost_of_sums)
            row = OUTCOMES.setdefault(title, {})
            if backend == "ditq":
                row[backend] = "**no**"
                row[backend] = check(host) or "yes"
                return
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    row[backend] = check(host) or "yes"
            except (Exception, pytest.fail.Exception) as error:
                reason = " ".join(str(error).split())[:70].replace("|", "/")
                row[backend] = f"no: {type(error).__name__}: {reason}".rstrip(": ")
                pytest.xfail(row[backend])

        test.__doc__ = check.__doc__
        return test

    return wrap


def _equal(got, expected):
    assert torch.equal(got, expected), f"differs by {(got - expected).abs().max():.1e}"


def _near(got, expected, bound):
    error = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error < bound, f"relative error {error:.1e}"


def _refused(function, words):
    """Whether it is refused by an exception that says why."""
    with pytest.raises((ValueError, NotImplementedError), match="|".join(map(re.escape, words))):
        function()
    return REFUSED


def _load_in(dtype):
    def check(host):
        model = host.load(torch_dtype=dtype)
        output = host.run(model, dtype)
        assert output.dtype == dtype
        if dtype == torch.float32:
            return _equal(output, host.run(host.load()))
        return _rounded(host, output, dtype)

    return check


def _rounded(host, output, dtype):
    """Off by no more than the roundings of its dtype cost this model in fp32.

    The derivation holds for scales that stay fp32. Others round theirs too, by right; 2 % tells that from broken.
    """
    bound = 0.02
    if host.backend == "ditq":
        bound = 2 * host.cost_of_rounding(host.load, host.run, dtype)
    _near(output, host.run(host.load()), bound)


test_fp32 = cell("`torch_dtype=torch.float32`")(_load_in(torch.float32))
test_bf16 = cell("`torch_dtype=torch.bfloat16`")(_load_in(torch.bfloat16))
test_fp16 = cell("`torch_dtype=torch.float16`")(_load_in(torch.float16))


def _mapped(device_map):
    def check(host):
        model = host.load(device_map=device_map)
        assert not any(p.is_meta for p in model.parameters())
        _equal(host.run(model), host.run(host.load()))

    return check


test_device_map_cpu = cell('`device_map="cpu"`')(_mapped("cpu"))
test_device_map_auto = cell('`device_map="auto"`')(_mapped("auto"))
test_device_map_balanced = cell('`device_map="balanced"`')(_mapped("balanced"))


@cell("`low_cpu_mem_usage=False`")
def test_low_cpu_mem_usage(host):
    _equal(host.run(host.load(low_cpu_mem_usage=True)), host.run(host.load()))
    return _refused(lambda: host.load(low_cpu_mem_usage=False), ["low_cpu_mem_usage"])


def _round_trip(host, load_options=None, **save_options):
    model = host.load()
    model.save_pretrained(host.tmp_path / "saved", **save_options)
    again = host.load(host.tmp_path / "saved", **(load_options or {}))
    _equal(host.run(again), host.run(model))
    return [path.name for path in (host.tmp_path / "saved").iterdir()]


@cell("`save_pretrained`, then `from_pretrained`: equal to the bit")
def test_save_pretrained(host):
    _round_trip(host)


@cell("`variant=`")
def test_variant(host):
    names = _round_trip(host, {"variant": "int8"}, variant="int8")
    assert any(".int8." in name for name in names)


@cell("shards")
def test_shards(host):
    names = _round_trip(host, max_shard_size="40KB")
    assert len([name for name in names if name.endswith(".safetensors")]) > 2


@cell("no pickle in what is saved")
def test_pickle_free(host):
    names = _round_trip(host)
    assert {name.rpartition(".")[2] for name in names} <= {"safetensors", "json"}


@cell("quantized while loading a float checkpoint")
def test_on_the_fly(host):
    folder = host.floats / "dit" / "transformer"
    model = DiTTransformer2DModel.from_pretrained(
        folder, quantization_config=host.config, torch_dtype=torch.float32
    )
    _near(host.run(model), host.run(DiTTransformer2DModel.from_pretrained(folder)), 0.03)


@cell("`PipelineQuantizationConfig`")
def test_pipeline_config(host):
    config = PipelineQuantizationConfig(quant_mapping={"transformer": host.config})
    pipe = DiffusionPipeline.from_pretrained(
        host.floats / "dit", quantization_config=config, dtype=torch.float32
    )
    assert pipe.transformer.is_quantized
    pipe.set_progress_bar_config(disable=True)
    images = pipe([3], num_inference_steps=2, output_type="np").images
    assert (images == images).all()


@cell("`push_to_hub` (to a local stand-in)")
def test_push_to_hub(host):
    model, out = host.load(), host.tmp_path / "hub"

    def upload(self, working_dir, repo_id, **options):
        shutil.copytree(working_dir, out / repo_id)

    with pytest.MonkeyPatch.context() as patch:
        reply = type("Reply", (), {"repo_id": "someone/packed"})
        for module in ("diffusers.utils.hub_utils", "diffusers.models.modeling_utils"):
            patch.setattr(f"{module}.create_repo", lambda *a, **k: reply)
        patch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", _no_card)
        patch.setattr("diffusers.models.modeling_utils.load_or_create_model_card", _no_card)
        patch.setattr("diffusers.utils.hub_utils.populate_model_card", lambda card, **k: card)
        patch.setattr("diffusers.models.modeling_utils.populate_model_card", lambda card, **k: card)
        patch.setattr(type(model), "_upload_folder", upload)
        model.push_to_hub("someone/packed")
    _equal(host.run(host.load(out / "someone" / "packed")), host.run(model))


def _no_card(*args, **kwargs):
    return type("Card", (), {"save": lambda self, path: None})()


@cell("sequential offload (weights on meta between layers)")
def test_sequential_offload(host):
    model = host.load()
    expected = host.run(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.transformer_blocks.parameters())
    _equal(host.run(model), expected)


@cell("offload to disk")
def test_disk_offload(host):
    places = {"pos_embed": "cpu", "transformer_blocks.0": "cpu", "transformer_blocks.1": "disk"}
    places |= {"norm_out": "cpu", "proj_out_1": "cpu", "proj_out_2": "cpu"}
    model = host.load(device_map=places, offload_folder=str(host.tmp_path))
    _equal(host.run(model), host.run(host.load()))


def _grouped(**options):
    def check(host):
        expected = host.run_flux(host.flux())
        model = host.flux()
        cpu = torch.device("cpu")
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
        _equal(host.run_flux(model), expected)

    return check


test_group_offload_leaf = cell("group offload, leaves (Flux)")(_grouped(offload_type="leaf_level"))
test_group_offload_block = cell("group offload, blocks (Flux)")(
    _grouped(offload_type="block_level", num_blocks_per_group=1)
)


@cell("group offload to disk (Flux)")
def test_group_offload_disk(host):
    _grouped(offload_type="leaf_level", offload_to_disk_path=str(host.tmp_path))(host)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("switch", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_pipeline_offload_on_a_gpu(packed_folder, switch):
    """The same kernels on the same inputs; weights offloaded layer by layer leave blocks unfused."""

    def sample(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe([3], num_inference_steps=2, generator=generator, output_type="np").images

    stock = DiffusionPipeline.from_pretrained(packed_folder("w8_static")).to("cuda")
    ditq.configure(stock.transformer, fuse=switch != "enable_sequential_cpu_offload")
    expected = sample(stock)
    pipe = DiffusionPipeline.from_pretrained(packed_folder("w8_static"))
    getattr(pipe, switch)()
    assert (sample(pipe) == expected).all()


@cell("`torch.compile(fullgraph=True)`: one graph for all steps")
def test_compile(host):
    model, graphs = host.load(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for steps in ((900, 900), (500, 10), (1, 1)):
            _equal(host.run(compiled, timesteps=steps), host.run(model, timesteps=steps))
    torch.compiler.reset()
    assert len(graphs) == 1, f"{len(graphs)} graphs"


@cell("`compile_repeated_blocks`")
def test_regional_compile(host):
    model = host.load()
    expected = host.run(model)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        _equal(host.run(model), expected)
    torch.compiler.reset()


@cell("`get_memory_footprint` is the bytes that are held")
def test_memory_footprint(host):
    model = host.load()
    held = sum(_nbytes(t) for t in [*model.parameters(), *model.buffers()])
    assert model.get_memory_footprint() == held, f"{model.get_memory_footprint()} B for {held} B"


def _nbytes(tensor):
    """Bytes of a tensor, and of the tensors inside of a wrapping one."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_nbytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


@cell("`.bfloat16()`: close to the fp32 output")
def test_bfloat16(host):
    _rounded(host, host.run(host.load().bfloat16(), torch.bfloat16), torch.bfloat16)


@cell("`.half()`, `.to(dtype)`")
def test_half(host):
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16)):
        outcome = _refused(lambda cast=cast: cast(host.load()), ["quantized", "dtype"])
    return outcome


@cell("`.to(device)`")
def test_to_device(host):
    model = host.load()
    _equal(host.run(model.to("cpu")), host.run(host.load()))
    assert all(p.is_meta for p in model.to("meta").parameters())


@cell("layerwise casting to fp8: packed layers stay exact")
def test_layerwise_casting(host):
    model = host.load()
    expected = host.run(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    # fp8 keeps 3 bits of the other layers' weights: an error of 2**-4 each
    _near(host.run(model), expected, 0.2)


CONTEXT_PARALLEL = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp, warnings
warnings.simplefilter("ignore")
sys.path[:0] = sys.argv[2:]
def rank(r, folder):
    sys.path[:0] = sys.argv[2:]
    import ditq_runtime
    from diffusers import ContextParallelConfig, FluxTransformer2DModel
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=r, world_size=2)
    torch.accelerator.current_accelerator = lambda *a, **k: torch.device("cpu")
    torch._C._get_accelerator = lambda *a, **k: torch.device("cpu")
    class Cpu:
        device_count = staticmethod(lambda: 2)
        current_device = staticmethod(lambda: 0)
    torch.get_device_module = lambda *a, **k: Cpu
    model = FluxTransformer2DModel.from_pretrained(folder + "/flux")
    inputs = torch.load(folder + "/inputs.pt")
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    if r == 0:
        torch.save(out, folder + "/out.pt")
    dist.destroy_process_group()
if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1],), nprocs=2)
"""


@cell("context parallel, 2 ranks (Flux)")
def test_context_parallel(host):
    if host.backend != "ditq":
        return "not run"
    model = host.flux()
    expected = host.run_flux(model)
    model.save_pretrained(host.tmp_path / "flux")
    torch.save(flux_inputs(), host.tmp_path / "inputs.pt")
    script = host.tmp_path / "ranks.py"
    script.write_text(CONTEXT_PARALLEL)
    paths = [path for path in sys.path if path and Path(path).is_dir()]
    command = [sys.executable, script, host.tmp_path, *paths]
    log = host.tmp_path / "ranks.log"
    with log.open("w") as file:
        ranks = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            code = ranks.wait(300)
        finally:
            if ranks.poll() is None:  # a rank that died leaves the other waiting
                os.killpg(ranks.pid, signal.SIGKILL)
                ranks.wait()
    assert code == 0, log.read_text().strip().splitlines()[-1]
    # each rank multiplies other rows at once, which orders float sums of 32 terms anew, each rounded to 2**-24
    ends = (".to_q", ".to_k", ".to_v", "_proj", "to_out.0", "to_add_out", "net.0.proj", "net.2")
    ends += ("proj_mlp", "blocks.0.proj_out")
    bound = host.cost_of_sums(host.flux, host.run_flux, 32 * 2.0**-24, ends)
    out = torch.load(host.tmp_path / "out.pt")
    _near(out, expected, bound)
    return None


@cell("tensor parallel")
def test_tensor_parallel(host):
    model = host.flux()
    config = TensorParallelConfig(tp_degree=2)
    return _refused(lambda: model.enable_parallelism(config=config), ["quantized"])


def _adapter(model, targets, seed=0):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets), model)
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=g)
    return peft.get_peft_model_state_dict(model)


TARGETS = ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear"]


@cell("LoRA: close to the float model with the LoRA")
def test_lora(host):
    tuned = DiTTransformer2DModel.from_pretrained(host.floats / "dit" / "transformer")
    state = _adapter(tuned, TARGETS)
    model = host.load()
    if host.backend == "ditq":
        ditq.load_lora(model, state)
    else:
        _adapter(model, TARGETS)
    _near(host.run(model.eval()), host.run(tuned.eval()), 0.1)
    return "`ditq.load_lora`" if host.backend == "ditq" else "yes"


@cell("PEFT's own wrapping: right, or refused")
def test_peft(host):
    model = host.load()
    if host.backend == "ditq":  # folded: PEFT would be silently wrong
        return _refused(lambda: _adapter(model, TARGETS), ["ditq.load_lora"])
    before = host.run(model)
    _adapter(model, TARGETS)
    assert not torch.equal(host.run(model.eval()), before)
    return None


@cell("`add_adapter` on a model without folds (Flux)")
def test_add_adapter(host):
    peft = pytest.importorskip("peft")
    model = host.flux()
    before = host.run_flux(model)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    assert not torch.equal(host.run_flux(model), before)
    model.disable_adapters()
    _equal(host.run_flux(model), before)


@cell("`fuse_lora`")
def test_fuse_lora(host):
    peft = pytest.importorskip("peft")
    model = host.flux()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    if host.backend == "ditq":
        return _refused(model.fuse_lora, ["cannot be merged into integer weights"])
    before = host.run_flux(model)
    model.fuse_lora()
    _near(host.run_flux(model), before, 0.05)
    return None


@cell("`fuse_qkv_projections`")
def test_fuse_qkv(host):
    model = host.flux()
    if host.backend == "ditq":
        return _refused(model.fuse_qkv_projections, ["stay apart"])
    before = host.run_flux(model)
    model.fuse_qkv_projections()
    _near(host.run_flux(model), before, 0.05)
    return None


@cell("`copy.deepcopy`")
def test_deepcopy(host):
    model = host.load()
    _equal(host.run(copy.deepcopy(model)), host.run(model))


@cell("two forwards are equal")
def test_determinism(host):
    model = host.load()
    assert not model.training
    _equal(host.run(model), host.run(model))


@cell("samples of a batch do not mix")
def test_batch(host):
    model = host.load()
    whole = host.run(model)
    for i in range(2):
        # float sums may be ordered by batch size, which moves a few int8 codes by one
        _near(host.run(model, batch=slice(i, i + 1)), whole[i : i + 1], 2e-3)


@cell("`load_state_dict` is strict and equal")
def test_state_dict(host):
    model, other = host.load(), host.load()
    state = model.state_dict()
    other.load_state_dict(state, strict=True)
    _equal(host.run(other), host.run(model))
    missing = dict(list(state.items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(missing)


@cell("sampling with `DiTPipeline`")
def test_pipeline(host):
    pipe = DiTPipeline(host.load(), build_identity_vae(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    images = pipe([3, 7], num_inference_steps=2, guidance_scale=1.5, output_type="np").images
    assert images.shape[0] == 2
    assert (images == images).all()


def test_the_table_in_the_documents_has_every_cell():
    text = (Path(__file__).parents[2] / "docs" / "host_matrix.md").read_text()
    assert len(set(TITLES)) == len(TITLES) > 30
    assert [title for title in TITLES if f"| {title} |" not in text] == []
    assert text.count("**no**") == 0

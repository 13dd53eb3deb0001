"""Other libraries in `ditq bench kernels` and `model`: stand-in packages on the path, and none at all."""

import csv
import sys

import pytest
import torch
from typer.testing import CliRunner

from ditq_bench import others
from ditq_bench.attention import bench_attention
from ditq_bench.cli import bench
from ditq_bench.gemm import candidates
from ditq_bench.peers import size_of
from ditq_bench.shapes import ATTENTION_SHAPES, SHAPES

CPU = torch.device("cpu")
STAND_INS = {
    "sdnq/__init__.py": '''
import torch


def sdnq_post_load_quant(model, weights_dtype, **options):
    """Weights in 8 bits, in place."""
    assert weights_dtype == "int8"
    for layer in model.modules():
        kept = options.get("modules_to_not_convert", ())
        if isinstance(layer, torch.nn.Linear) and not kept:
            step = layer.weight.abs().amax(1, keepdim=True) / 127
            layer.weight.data = (layer.weight / step).round() * step
    return model
''',
    "gemlite/__init__.py": "",
    "gemlite/helper.py": """
class A8W8_int8_dynamic:
    def __init__(self, device, dtype):
        self.device = device

    def from_linear(self, layer):
        raise RuntimeError("no driver\\non this machine")
""",
    "comfy_kitchen/__init__.py": "",
    "comfy_kitchen/tensor.py": """
TensorCoreFP8Layout = "fp8"


class QuantizedTensor:
    @staticmethod
    def from_float(x, layout):
        return 2 * x
""",
    "sageattention.py": """
import torch


def sageattn(query, key, value, tensor_layout, is_causal):
    assert (tensor_layout, is_causal) == ("HND", False)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)
""",
    "nunchaku.py": "",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    for name, text in STAND_INS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    roots = {name.split("/")[0].removesuffix(".py") for name in STAND_INS}
    for name in [name for name in sys.modules if name.split(".")[0] in roots]:
        del sys.modules[name]


@pytest.mark.usefixtures("installed")
def test_a_library_gets_a_row_unless_it_fails_or_is_wrong(capsys):
    """gemlite's stand-in raises; comfy-kitchen's doubles weights and inputs, so three times the product is too much."""
    found = candidates(SHAPES["digits"][0], CPU, tuple(others.OTHERS))
    names = [one.name for one in found]
    assert names[2] == "SDNQ int8"
    assert not {"gemlite int8 dynamic", "comfy-kitchen fp8", "SageAttention"} & set(names)
    sdnq = found[2]
    assert 0 < sdnq.check(sdnq.run()) < sdnq.tolerance
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).split())
    shape = SHAPES["digits"][0].name
    assert f"gemlite at {shape} gets no row: RuntimeError: no driver on this machine" in text
    assert f"comfy-kitchen at {shape} gets no row: its result is off by" in text


@pytest.mark.usefixtures("installed")
def test_attention_of_a_library_is_timed_beside_ours():
    rows = bench_attention(ATTENTION_SHAPES["digits"][0], CPU, 0.2, None, ("sageattention", "sdnq"))
    assert "SageAttention" in [row.candidate for row in rows]
    assert "SDNQ int8" not in [row.candidate for row in rows]


def refused(*arguments):
    result = CliRunner().invoke(bench, list(arguments))
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("name", ["gemlite", "nunchaku", "sageattention", "comfy-kitchen"])
def test_what_is_not_installed_is_named(name, tmp_path):
    text = refused("kernels", "--device", "cpu", "--against", name, "--out", str(tmp_path))
    assert f"--against {name}: {name} is not installed; leave it out." in text
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("installed")
def test_what_needs_a_gpu_or_a_checkpoint_of_its_own_is_named():
    reasons = {name: others.refusal(name, CPU) for name in others.OTHERS}
    assert reasons.pop("sdnq") == ""
    assert reasons.pop("nunchaku").startswith("it reads weights that DeepCompressor packed")
    assert set(reasons) == {"gemlite", "sageattention", "comfy-kitchen"}
    for name, reason in reasons.items():
        assert reason == f"{name} runs on a CUDA GPU only, and this is cpu"
    assert others.refusal("gemlite", torch.device("cuda")) == ""


@pytest.mark.usefixtures("installed")
def test_a_model_is_timed_beside_those_of_other_libraries(tmp_path):
    options = ["--images", "1", "--steps", "1", "--budget", "0.4", "--device", "cpu"]
    result = CliRunner().invoke(
        bench, ["model", "demo:digits", "--against", "sdnq", *options, "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    with (tmp_path / "model.csv").open() as file:
        rows = list(csv.DictReader(file))
    modes = [row["mode"] for row in rows if row["what"] == "step"]
    assert modes == ["eager", "eager, float", "eager, ditq W8A8", "eager, sdnq"]
    assert all(float(row["median_ms"]) > 0 for row in rows)
    text = refused("model", "demo:digits", "--against", "torchao", *options)
    assert "--against torchao: torchao is not installed; leave it out." in text


def test_sizes_count_shared_memory_and_the_embedder_of_all_blocks_once():
    """8 bytes of a weight, seen twice, 12 of the first block's embedder."""
    blocks = []
    for _ in range(2):
        block = torch.nn.Module()
        block.norm1 = torch.nn.Module()
        block.norm1.emb = torch.nn.Linear(3, 1, bias=False)
        blocks.append(block)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(blocks)
    model.first = torch.nn.Linear(2, 1, bias=False)
    model.again = torch.nn.Module()
    model.again.register_buffer("seen", model.first.weight.data)
    assert size_of(model) == 8 + 12

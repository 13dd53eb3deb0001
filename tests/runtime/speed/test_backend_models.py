"""Whole models through the compile backend: results, graphs and recompilations beside those of eager and of floats.

Each day runs one of the families. `DITQ_FAMILIES=all python -m pytest tests/runtime/speed` runs all of them.
"""

import datetime
import os
import warnings

import pytest
import torch
from torch._dynamo.utils import counters

import ditq_runtime as ditq
from ditq_bench.zoo import CLASSES, outputs, quiet
from ditq_converters import Recipe, convert
from ditq_runtime.speed.backend.compile import CONFIG

AOT = {"backend": "ditq", "options": {"inner": "aot_eager"}, "fullgraph": True}
# every class of fused op fires in one of them; diffusers' other classes are no different for the backend
FAMILIES = {  # class -> what is rewritten at least
    "DiTTransformer2DModel": {"adaln_quantize", "gelu_quantize", "gemm_residual", "gemm_many"},
    "FluxTransformer2DModel": {"adaln_quantize", "gelu_quantize", "gemm_residual", "gemm_many"},
    "SD3Transformer2DModel": {"adaln_quantize", "gelu_quantize", "gemm_residual", "gemm_many"},
    "WanTransformer3DModel": {"adaln_quantize", "gelu_quantize", "gemm_residual", "gemm_many"},
    "QwenImageTransformer2DModel": {
        "adaln_quantize",
        "gelu_quantize",
        "gemm_residual",
        "gemm_many",
    },
    "PixArtTransformer2DModel": {"adaln_quantize", "gelu_quantize", "gemm_residual", "gemm_many"},
    "AuraFlowTransformer2DModel": {"adaln_quantize", "gemm_residual", "gemm_many"},
    "CogView4Transformer2DModel": {"adaln_quantize", "gelu_quantize", "gemm_residual", "gemm_many"},
    "SanaTransformer2DModel": {"adaln_quantize", "gemm_residual", "gemm_many"},
    "LTXVideoTransformer3DModel": {"gelu_quantize", "gemm_residual", "gemm_many"},
}
TODAY = list(FAMILIES)[datetime.date.today().toordinal() % len(FAMILIES)]
DUE = list(FAMILIES) if "DITQ_FAMILIES" in os.environ else [TODAY]


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test, and silence about the compiler's own warnings."""
    torch.compiler.reset()
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


def packed(source, folder):
    """A float model quantized as it loads, its blocks as diffusers wrote them."""
    source.save_pretrained(folder)
    model = type(source).from_pretrained(folder, quantization_config=ditq.DitqConfig(weights="w8"))
    ditq.configure(model, fuse=False)
    return model.eval().requires_grad_(False)


def graphs(run):
    """How many graphs a run compiles; a graph break is an error of `fullgraph`."""
    torch.compiler.reset()
    counters.clear()
    run()
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", DUE)
def test_a_family_compiles_as_its_float_model_does(name, tmp_path):
    """The whole model with symbols for sizes, then its blocks: no graph break, no graph that floats do not need."""
    tiny = CLASSES[name]
    source = tiny.build()
    model = packed(source, tmp_path)
    source._repeated_blocks = source._repeated_blocks or model._repeated_blocks
    batches = [tiny.inputs(model, batch) for batch in (2, 3)]
    expected = [outputs(model, inputs) for inputs in batches]
    found = []

    def whole(of, **options):
        compiled = torch.compile(of, dynamic=True, fullgraph=True, **options)
        found[:] = [outputs(compiled, inputs) for inputs in batches]

    def blocks(of, **options):
        of.compile_repeated_blocks(fullgraph=True, **options)
        found[:] = [outputs(of, inputs) for inputs in batches]

    for way, inner in ((whole, "eager"), (blocks, "aot_eager")):
        allowed = graphs(lambda way=way: way(source, backend="eager"))
        ours = {"backend": "ditq", "options": {"inner": inner}}
        assert graphs(lambda way=way, ours=ours: way(model, **ours)) <= allowed
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        fired = {op for graph in ditq.compile_report() for op in graph.fired}
        assert fired >= FAMILIES[name]


FORMATS = {
    "w8, static": (
        Recipe("smoothquant", "w8", "static"),
        {"adaln_quantize": 4, "gemm_gelu_quantize": 2, "gemm_residual": 4},
    ),
    "w4p, a zero point a token, a low-rank branch": (
        Recipe("smoothquant", "w4p", "token_asym", group_size=32, lora_rank=4),
        {"adaln_quantize": 4, "gelu_quantize": 2, "gemm_residual": 4},
    ),
    "w4g, two timestep groups, static": (
        Recipe("htg", "w4g", "static", group_size=32, num_groups=2),
        {"adaln_quantize": 4, "gemm_gelu_quantize": 2, "gemm_residual": 4},
    ),
    "w8, int8 attention": (
        Recipe("linear", "w8", "token", attention="int8"),
        {"adaln_quantize": 4, "gelu_quantize": 2, "gemm_residual": 4},
    ),
}


def inputs_of(*timesteps):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 1, 8, 8, generator=generator),
        "timestep": torch.tensor(timesteps),
        "class_labels": torch.tensor([3, 7]),
    }


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_bits_of_eager_in_one_graph(name, pipes, stats):
    recipe, fired = FORMATS[name]
    model = convert(pipes["own"], recipe, stats["own"], quiet=True)
    ditq.configure(model, fuse=False)
    steps = [inputs_of(900, 10), inputs_of(500, 500)]
    expected, found = [outputs(model, step) for step in steps], []
    compiled = torch.compile(model, **AOT)
    assert graphs(lambda: found.extend(outputs(compiled, step) for step in steps)) == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    seen = ditq.compile_report()[-1].fired
    assert {op: seen.get(op) for op in fired} == fired


def test_inductor_runs_a_whole_model_and_blocks(build_model, tmp_path, cost_of_sums):
    """Norms sum 64 numbers in another order: 64 * 2**-24 of the largest; GELU has another tanh, 2**-21 of it."""
    source = build_model(num_layers=1)
    model = packed(source, tmp_path / "dit")
    inputs = inputs_of(900, 10)
    (expected,) = outputs(model, inputs)
    bound = cost_of_sums(lambda: model, lambda one: outputs(one, inputs)[0], 64 * 2.0**-24)
    model = packed(source, tmp_path / "dit")
    (found,) = outputs(torch.compile(model, backend="ditq", fullgraph=True), inputs)
    assert 0 <= float((found - expected).norm() / expected.norm()) <= bound

    tiny = CLASSES["FluxTransformer2DModel"]
    flux = packed(tiny.build(), tmp_path / "flux")
    inputs = tiny.inputs(flux)
    expected = outputs(flux, inputs)
    flux.compile_repeated_blocks(backend="ditq", fullgraph=True)
    # no code moves here, and what is float is summed in fp32
    torch.testing.assert_close(outputs(flux, inputs), expected, rtol=1e-5, atol=1e-5)
    assert {graph.inner for graph in ditq.compile_report()[-2:]} == {"inductor"}


def test_settings_of_inductor_have_their_names():
    from torch._inductor import list_options

    assert set(CONFIG) <= set(list_options())

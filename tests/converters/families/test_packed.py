"""Packed models of every family: close to float, equal after a round trip through disk and a new process."""

import copy
import math
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers.utils import logging

from ditq_converters import Recipe, convert
from ditq_runtime import DitqConfig, QuantLinear, execution_report

NAMES = ["dit", "pixart-alpha", "pixart-sigma", "sd3", "sd3.5", "flux-schnell", "flux-dev"]
W8A8 = Recipe("linear", "w8", "token")
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def packed(make_case, tmp_path_factory):
    """Name -> (float model, batch, packed model, its folder), made at the first request."""
    made = {}

    def get(name):
        if name not in made:
            model, inputs = make_case(name)
            out = tmp_path_factory.mktemp("packed") / name
            made[name] = model, inputs, convert(model, W8A8, out=out, quiet=True), out
        return made[name]

    return get


def relative(got, truth):
    return float((got.float() - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", NAMES)
def test_one_forward_in_integers_errs_as_its_codes_do(packed, run, name, cost_of_codes):
    """No less than sqrt(1 / 2) and no more than sqrt(2) times: see `cost_of_codes`."""
    model, inputs, quantized, _ = packed(name)
    error = relative(run(quantized, inputs), run(model, inputs))
    assert 0.5**0.5 < error / cost_of_codes(model, quantized, inputs) < 2**0.5


@pytest.mark.parametrize("name", NAMES)
def test_four_bit_weights_err_as_their_codes_do(make_case, run, name, cost_of_codes):
    """Twice either way: the errors of modulation weights, now the most, reach all tokens alike. They are one draw."""
    model, inputs = make_case(name)
    quantized = convert(model, Recipe("linear", "w4p", "token", group_size=32), quiet=True)
    error = relative(run(quantized, inputs), run(model, inputs))
    assert 0.5 < error / cost_of_codes(model, quantized, inputs) < 2


@pytest.mark.parametrize("name", NAMES)
def test_the_report_proves_what_ran(packed, name):
    _, inputs, quantized, _ = packed(name)
    for report in (execution_report(quantized), execution_report(quantized, inputs)):
        integer = {layer.name for layer in report.layers if layer.integer}
        listed = quantized.config.quantization_config.scheme
        assert integer == {n for n in listed.layers if listed.format_of(n).integer_gemm}
        assert report.totals["integer_flops_share"] > 0.8
        assert all(layer.note for layer in report.layers if not layer.integer)


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_the_file_is_the_same_to_the_byte(packed, run, tmp_path, name):
    model, inputs, quantized, out = packed(name)
    loaded = type(model).from_pretrained(out)
    assert torch.equal(run(loaded, inputs), run(quantized, inputs))
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == (out / FILE).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_keeps_scales_and_multipliers_in_fp32(packed, run, name, cost_of_codes):
    """Codes add their energy to what bf16 costs the float model, Flux's timestep in bf16 included: no more sources."""
    model, inputs, _, out = packed(name)
    half = type(model).from_pretrained(out, torch_dtype=torch.bfloat16)
    pinned = ("weight_scale", "scale_shift_table.weight", "scale_shift_table.bias")
    for key, tensor in half.state_dict().items():
        if key.endswith(pinned) and "transformer_blocks" in key:
            assert tensor.dtype == torch.float32, key
    for key, module in half.named_modules():
        if isinstance(module, QuantLinear):
            # diffusers' own last norm takes its modulation in the model's dtype
            assert module.wide_output == ("norm" in key and "transformer_blocks" in key), key

    def cast(value):
        if isinstance(value, dict):
            return {k: cast(v) for k, v in value.items()}
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.bfloat16() if floating else value

    narrow = {key: cast(value) for key, value in inputs.items()}
    truth, got = run(model, inputs), run(half, narrow)
    assert got.dtype == torch.bfloat16
    rounding = relative(run(copy.deepcopy(model).bfloat16(), narrow), truth)
    cost = cost_of_codes(model, packed(name)[2], inputs)
    assert 0.5**0.5 < relative(got, truth) / math.hypot(rounding, cost) < 2**0.5


@pytest.mark.parametrize("name", ["pixart-alpha", "sd3.5", "flux-dev"])
def test_quantized_as_it_loads_it_is_the_converters_file(packed, tmp_path, name, caplog):
    model, _, _, out = packed(name)
    model.save_pretrained(tmp_path / "float")
    logging.enable_propagation()
    try:
        loaded = type(model).from_pretrained(
            tmp_path / "float", quantization_config=DitqConfig(weights="w8")
        )
    finally:
        logging.disable_propagation()
    assert "not used" not in caplog.text
    assert "newly initialized" not in caplog.text
    loaded.save_pretrained(tmp_path / "packed")
    assert (tmp_path / "packed" / FILE).read_bytes() == (out / FILE).read_bytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("row_by_row")
def test_a_batch_is_its_samples(packed, run, name):
    """Per-token scales see one row: a sample does not depend on its batch mates."""
    _, inputs, quantized, _ = packed(name)

    def pick(key, value):
        if isinstance(value, dict):
            return {k: pick(k, v) for k, v in value.items()}
        return value if key in ("img_ids", "txt_ids") or value is None else value[1:2]

    alone = run(quantized, {key: pick(key, value) for key, value in inputs.items()})
    assert torch.equal(run(quantized, inputs)[1:2], alone)


@pytest.mark.parametrize("name", ["sd3.5", "flux-dev", "pixart-sigma"])
def test_one_graph_compiles_and_is_the_same_function(packed, run, name):
    _, inputs, quantized, _ = packed(name)
    compiled = torch.compile(copy.deepcopy(quantized), fullgraph=True, backend="eager")
    assert torch.equal(run(compiled, inputs), run(quantized, inputs))


PLAY = """
import sys, torch, diffusers
import ditq_runtime as ditq
for name, (kind, out, inputs, expected) in torch.load(sys.argv[1]).items():
    model = getattr(diffusers, kind).from_pretrained(out)
    with torch.no_grad():
        got = model(**inputs, return_dict=False)[0]
    assert torch.equal(got, expected), (name, (got - expected).abs().max())
    print(ditq.execution_report(model, inputs).totals["integer_linears"])
"""


def test_a_new_process_with_the_stock_classes_computes_the_same(packed, run, tmp_path):
    names, cases = ["dit", "pixart-sigma", "sd3.5", "flux-dev"], {}
    for name in names:  # one process for all: its imports take longer than the models
        model, inputs, quantized, out = packed(name)
        cases[name] = type(model).__name__, str(out), inputs, run(quantized, inputs)
    torch.save(cases, tmp_path / "cases.pt")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAY, str(tmp_path / "cases.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    counts = [int(line) for line in ran.stdout.split()[-len(names) :]]
    assert all(count > 10 for count in counts)


def test_flux_caches_know_the_packed_blocks(packed, run):
    """diffusers' caches look a block's class up."""
    _, inputs, quantized, _ = packed("flux-dev")
    cached = copy.deepcopy(quantized)
    cached.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    with cached.cache_context("test"):
        assert torch.equal(run(cached, inputs), run(quantized, inputs))

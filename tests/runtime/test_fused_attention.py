"""The attention of a fused block where scales are static: one GEMM for q, k and v, codes for the output projection."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

import ditq_kernels as k
import ditq_runtime as ditq
from ditq_bench.launches import launches_of
from ditq_converters import Recipe, calibrate, convert
from ditq_runtime.attention import quantized as attention
from ditq_runtime.attention.quantized import QuantAttention
from ditq_runtime.families.attend import has_one_gemm
from ditq_runtime.format.attention import CORE

BLOCKS, D, LINEARS = 2, 64, ("to_q", "to_k", "to_v", "to_out.0")
FIRST = "transformer_blocks.0.attn1"
SEVEN = (
    "adaln_quantize", "gemm_qkv_quantize", "attention_qk_int8_pv_int8", "gemm_residual",
    "adaln_quantize", "gemm_gelu_quantize", "gemm_residual",
)  # fmt: skip


def recipe(method="smoothquant", activations="static", **options):
    settings = {"weights": "w8", "attention": "int8", "group_size": 32} | options
    return Recipe(method, activations=activations, **settings)


ALL_STATIC = recipe()


@pytest.fixture(scope="module")
def make(pipes, tmp_path_factory):
    """Recipe -> a freshly loaded packed transformer; calibrated on three steps, so that there are timestep groups."""
    root = tmp_path_factory.mktemp("fused_attention")
    stats = calibrate(pipes["own"], root / "stats", steps=3, samples=2, quiet=True)
    folders = {}

    def load(wanted, **options):
        if wanted not in folders:
            folders[wanted] = root / str(len(folders))
            convert(pipes["own"], wanted, stats, folders[wanted], quiet=True)
        return DiTTransformer2DModel.from_pretrained(folders[wanted] / "transformer", **options)

    return load


def run(model, dtype=torch.float32):
    latents = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    steps, labels = torch.tensor([10, 900, 500]), torch.tensor([3, 1000, 7])
    with torch.no_grad():
        return model(latents, timestep=steps, class_labels=labels).sample


def fused_and_stock(model):
    ditq.configure(model, fuse=True)
    fused = run(model)
    ditq.configure(model, fuse=False)
    return fused, run(model)


def ops_of(model, name=FIRST):
    """Ops of the attention's linears and of itself, as the report has them."""
    ditq.configure(model, fuse=True)
    report = ditq.execution_report(model)
    assert report.totals["fused_blocks"] == BLOCKS
    rows = {row.name: row.op for row in report.layers + report.attention}
    return (*(rows[f"{name}.{linear}"] for linear in LINEARS), rows[name])


ONE_GEMM = ("adaln_quantize + gemm_qkv_quantize", "gemm_qkv_quantize", "gemm_qkv_quantize")
APART = ("adaln_quantize + gemm_w8a8", "gemm_w8a8", "gemm_w8a8")
INT8 = "attention_qk_int8_pv_int8"
CASES = {  # recipe -> ops of q, k, v, out, the attention
    "static": (ALL_STATIC, (*ONE_GEMM, "gemm_residual", INT8)),
    "static w4p": (recipe(weights="w4p"), (*ONE_GEMM, "gemm_residual", INT8)),
    "static w4g": (recipe(weights="w4g"), (*ONE_GEMM, "gemm_residual", INT8)),
    "w4g per token": (
        recipe(weights="w4g", activations="token", attention_scales="static"),
        (*ONE_GEMM, "quantize_per_token + gemm_residual", INT8),
    ),
    "three groups": (recipe("htg", num_groups=3), (*ONE_GEMM, "gemm_residual", INT8)),
    "scales of q, k, v per token": (
        recipe(attention_scales="token"),
        (*APART, "gemm_residual", f"quantize_heads + {INT8}"),
    ),
    "activations per token": (
        recipe(activations="token", attention_scales="static"),
        (*ONE_GEMM, "quantize_per_token + gemm_residual", INT8),
    ),
    "values in bf16": (
        recipe(attention="bf16"),
        (*APART, "gemm_residual", "quantize_heads + attention_qk_int8_pv_bf16"),
    ),
    "a low-rank branch": (
        recipe("htg", lora_rank=4),
        (
            "adaln_quantize + lora_down + gemm_w8a8", *["lora_down + gemm_w8a8"] * 2,
            "lora_down + gemm_residual", f"quantize_heads + {INT8}",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_static_is_fused_and_gives_the_bits_of_the_stock_path(make, case):
    wanted, ops = CASES[case]
    model = make(wanted)
    assert ops_of(model) == ops
    fused, stock = fused_and_stock(model)
    assert torch.equal(fused, stock)


def test_a_block_is_seven_launches(make):
    block = make(ALL_STATIC).transformer_blocks[1]
    counted = launches_of(block, D, tokens=16)
    assert counted == {f"ditq.{op}": SEVEN.count(op) for op in set(SEVEN)}
    assert tuple(op for op, _ in block.fusion.layout.steps(block)) == SEVEN


def test_the_report_counts_what_the_stock_path_counts(make):
    """One GEMM of three layers is the work of three, each with its own row."""
    model = make(ALL_STATIC)
    fused = ditq.execution_report(model)
    ditq.configure(model, fuse=False)
    stock = ditq.execution_report(model)
    for field in ("name", "flops", "nbytes", "integer", "backend"):
        for rows in ("layers", "attention"):
            seen, expected = ([getattr(r, field) for r in getattr(x, rows)] for x in (fused, stock))
            assert seen == expected
    assert fused.totals | {"fused_blocks": 0} == stock.totals


def test_who_watches_the_attention_sees_it_called(make):
    """A hook on the core alone leaves the block fused, but not the core out."""
    model, seen = make(ALL_STATIC), []
    expected = run(model)
    core = model.get_submodule(f"{FIRST}.{CORE}")
    handle = core.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    watched = (*APART, "quantize_static + gemm_residual", f"quantize_heads + {INT8}")
    assert ops_of(model) == watched
    seen.clear()
    assert torch.equal(run(model), expected)
    assert seen == [(3, 16, core.heads, D // core.heads)]
    handle.remove()
    assert ops_of(model) == CASES["static"][1]


def test_layers_of_different_formats_run_apart(make):
    model = make(ALL_STATIC)
    attn, other = model.get_submodule(FIRST), make(recipe("htg", num_groups=3)).get_submodule(FIRST)
    assert has_one_gemm(attn)
    attn.to_v = other.to_v
    assert not has_one_gemm(attn)


def test_the_weights_of_another_layer_are_a_fallback(make, monkeypatch):
    model = make(ALL_STATIC)
    attn = model.get_submodule(FIRST)
    monkeypatch.setattr(attn.to_k, "packed", attn.to_v.packed)
    with pytest.raises(
        ditq.FallbackError, match=r"to_k, .*: its gemm_qkv_quantize ran on the weights of .*to_q, .*to_v, .*to_v"
    ):  # fmt: skip
        ditq.execution_report(model)


def test_an_attention_that_quantizes_by_itself_is_a_fallback(make, monkeypatch):
    """Three quantizers more than the block promises."""
    model, quantizing = make(ALL_STATIC), QuantAttention.forward
    floats = torch.randn(1, 16, 2, 32)

    def of_codes(self, query, key, value, **out):
        return quantizing(self, *[floats] * 3, None, **out)

    monkeypatch.setattr(QuantAttention, "of_codes", of_codes)
    with pytest.raises(
        ditq.FallbackError, match=r"blocks\.0: fused, expected .* but .*quantize_heads"
    ):
        ditq.execution_report(model)


def test_in_bf16_codes_differ_by_one_rounding(make, monkeypatch):
    """Stock rounds q, k and v to bf16, 2**-8 of a value: under 128 * 2**-8 = 0.5 steps inside the range, and so at most
    one code. The first block of both reads one stream."""
    model, seen = make(ALL_STATIC, torch_dtype=torch.bfloat16), {"fused": [], "stock": []}
    of_codes, quantize = QuantAttention.of_codes, k.quantize_heads

    def fused(self, *codes, **out):
        seen["fused"] += codes
        return of_codes(self, *codes, **out)

    def stock(x, **rest):
        codes, scales = quantize(x, **rest)
        seen["stock"].append(codes)
        return codes, scales

    monkeypatch.setattr(QuantAttention, "of_codes", fused)
    monkeypatch.setattr(attention.k, "quantize_heads", stock)
    for fuse in (True, False):
        ditq.configure(model, fuse=fuse)
        run(model, torch.bfloat16)
    moved = [
        (a.int() - b.int()).abs() for a, b in zip(seen["fused"][:3], seen["stock"][:3], strict=True)
    ]
    assert len(moved) == 3
    assert all(m.sum() > 0 and m.max() <= 1 for m in moved)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weights", ["w8", "w4p"])
def test_on_a_gpu_one_gemm_is_near_three(make, weights, cost_of_sums):
    """Norms summed in another order and another GELU move what is quantized by 2**-20 of a token's largest; codes move
    as often as their input errs, so noise of 16 times that costs 4 times as much."""
    bound = cost_of_sums(lambda: make(recipe(weights=weights)), run, 16 * 2.0**-20)
    model = make(recipe(weights=weights)).to("cuda")
    outputs = {}
    for fuse in (True, False):
        ditq.configure(model, linear="triton", fuse=fuse)
        latents = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).cuda()
        steps = torch.tensor([10, 900, 500], device="cuda")
        with torch.no_grad():
            outputs[fuse] = model(latents, timestep=steps, class_labels=steps).sample
    assert (outputs[True] - outputs[False]).norm() / outputs[False].norm() < bound

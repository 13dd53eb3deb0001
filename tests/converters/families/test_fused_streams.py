"""Fused blocks with two streams: the bits of the stock path in fp32, the ops they promise, where they may not run."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import ditq_runtime as ditq
from ditq_converters import Recipe, convert
from ditq_runtime.families.fusible import examine, fusible_blocks
from ditq_runtime.layers.carrier import here

W8 = {"method": "linear", "weights": "w8", "activations": "token"}
W4 = W8 | {"weights": "w4p", "group_size": 32}
CASES = [
    *((name, W8) for name in ("sd3", "sd3.5", "flux-schnell", "flux-dev")),
    *((f"{name}-attention", W8 | {"attention": "int8"}) for name in ("sd3", "sd3.5", "flux")),
    *((f"{name}-attention", W4 | {"attention": "bf16"}) for name in ("sd3.5", "flux")),
]


def both_ways(run, model, inputs):
    """Output fused and not; fails if a block is not fused, or runs other ops than it promises."""
    count = len(fusible_blocks(model))
    ditq.configure(model, fuse=False)
    assert ditq.execution_report(model, inputs).totals["fused_blocks"] == 0
    stock = run(model, inputs)
    ditq.configure(model, fuse=True)
    assert ditq.execution_report(model, inputs).totals["fused_blocks"] == count > 0
    return run(model, inputs), stock


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_fused_equals_stock_to_the_bit(make_case, run, name, recipe):
    model, inputs = make_case(name)
    fused, stock = both_ways(run, convert(model, Recipe(**recipe), quiet=True), inputs)
    assert torch.equal(fused, stock)


def test_projections_of_one_kind_are_one_launch(make_case):
    """Three of a stream, and the MLP of a block with one."""
    model, inputs = make_case("flux-dev")
    packed = convert(model, Recipe(**W8), quiet=True)
    ran = {row.name: row.op for row in ditq.execution_report(packed, inputs).layers}
    double, single = "transformer_blocks.0.attn.", "single_transformer_blocks.0."
    for first in (f"{double}to_q", f"{double}add_q_proj", f"{single}attn.to_q"):
        assert ran[first] == "adaln_quantize + gemm_many"
    rest = [f"{double}to_k", f"{double}add_v_proj", f"{single}attn.to_v", f"{single}proj_mlp"]
    assert {ran[name] for name in rest} == {"gemm_many"}


def _own_site(model):
    layer = model.single_transformer_blocks[0].proj_mlp
    layer.read(copy.deepcopy(layer.site))
    examine(model.single_transformer_blocks[0])


def _probe(model):
    model.single_transformer_blocks[0].attn.to_k.register_forward_hook(lambda *_: None)


def _processor(model):
    model.transformer_blocks[0].attn.set_processor(SubProcessor())


class SubProcessor(FluxAttnProcessor):
    """Somebody's own."""


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (_own_site, "attn and proj_mlp quantize their input in different ways"),
        (_probe, "attn.to_k has a hook"),
        (_processor, "attn has a processor SubProcessor"),
    ],
)
def test_a_block_that_cannot_runs_as_ever_and_the_report_says_why(make_case, run, change, note):
    model, inputs = make_case("flux-dev")
    packed = convert(model, Recipe(**W8), quiet=True)
    fused = run(packed, inputs)
    change(packed)
    report = ditq.execution_report(packed, inputs)
    blocks = len(fusible_blocks(packed))
    assert report.totals["fused_blocks"] == blocks - 1
    (why,) = (row.note for row in report.blocks if not row.fused)
    assert note in why
    assert torch.equal(run(packed, inputs), fused)


def test_arguments_for_the_attention_keep_blocks_unfused(make_case, run):
    model, inputs = make_case("flux-dev")
    packed = convert(model, Recipe(**W8), quiet=True)
    told = inputs | {"joint_attention_kwargs": {"attention_mask": None}}
    report = ditq.execution_report(packed, told)
    assert {row.note for row in report.blocks} == {"joint_attention_kwargs given to the model"}
    assert torch.equal(run(packed, told), run(packed, inputs))


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "flux-attention"])
def test_without_a_token_of_text_they_run_as_stock_blocks_do(make_case, run, name):
    model, inputs = make_case(name)
    options = W8 | ({"attention": "int8"} if "attention" in name else {})
    packed = convert(model, Recipe(**options), quiet=True)
    few = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :0]}
    few |= {key: inputs[key][:0] for key in inputs if key == "txt_ids"}
    fused, stock = both_ways(run, packed, few)
    assert torch.equal(fused, stock)


@pytest.mark.parametrize("fuse", [True, False])
def test_fp16_streams_are_clipped_as_diffusers_does(make_case, fuse):
    """A gate that makes the sum pass 65504: infinity without the clip."""
    model, _ = make_case("flux-dev")
    packed = convert(model, Recipe(**W8), quiet=True)
    ditq.configure(packed, fuse=fuse)
    block = packed.single_transformer_blocks[0].half()
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.randn(1, n, 64, generator=generator).half() for n in (2, 3))
    shift, scale, gate = torch.zeros(1, 64), torch.ones(1, 64), torch.full((1, 64), 1e7)
    here().hoisted = {block.norm: torch.cat([shift, scale, gate], dim=1)}
    try:
        with torch.no_grad():
            parts = block(image, text, torch.ones(1, 64))
    finally:
        here().hoisted = None
    assert [part.shape[1] for part in parts] == [2, 3]
    assert max(float(part.abs().max()) for part in parts) == 65504

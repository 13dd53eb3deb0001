"""Fused blocks: the bits of the stock path, where they may run, and that the report sees which way it went."""

import copy
import warnings
from itertools import product

import accelerate
import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch.utils._pytree import tree_map_only

import ditq_runtime as ditq
from ditq_bench.zoo import CLASSES
from ditq_converters import Recipe, calibrate, convert
from ditq_runtime.families.fused import Layout
from ditq_runtime.families.fusible import examine
from ditq_runtime.layers.carrier import here
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.report.fused import BlockRun

B, TOKENS, D, BLOCKS = 3, 16, 64, 2
FC1, FC2, TO_Q, TO_OUT = "ff.net.0.proj", "ff.net.2", "attn1.to_q", "attn1.to_out.0"
SECOND = "transformer_blocks.1"


MODELS = {"dit": DiTTransformer2DModel, "pixart": PixArtTransformer2DModel}
FAMILIES = pytest.mark.parametrize("family", MODELS)


@pytest.fixture(scope="module")
def make(pipes, pixart, tmp_path_factory):
    """Recipe -> a freshly loaded packed transformer; calibrated on three steps, so that there are timestep groups."""
    root = tmp_path_factory.mktemp("fused")
    plan = {"steps": 3, "samples": 2, "quiet": True}
    stats, folders = {}, {}

    def source(family):
        if family == "dit":
            return pipes["own"].transformer, {}
        case = pixart()
        return case.model, {"prompts": case.prompts, "rows": 8, "height": 64, "width": 64}

    def load(recipe, family="dit", **options):
        if (recipe, family) not in folders:
            model, extra = source(family)
            if family not in stats:
                stats[family] = calibrate(model, root / family, **plan, **extra)
            folder = folders[recipe, family] = root / str(len(folders))
            convert(model, recipe, stats[family], quiet=True).save_pretrained(folder)
        return MODELS[family].from_pretrained(folders[recipe, family], **options)

    return load


STATIC = Recipe("smoothquant", "w8", "static")
TOKEN = Recipe("smoothquant", "w4p", "token", group_size=32)
REAL_GROUPS = Recipe("smoothquant", "w4g", "static", group_size=32)
CROSS_INT8 = Recipe("smoothquant", "w8", "static", attention="int8")


def _randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] + [0] * 5])  # captions of B images, padded
INPUTS = {  # a batch with three timesteps, from both ends of the schedule
    "DiTTransformer2DModel": {"class_labels": torch.tensor([3, 1000, 7])},
    "PixArtTransformer2DModel": {
        "encoder_hidden_states": _randn(B, 6, 32, seed=2),
        "encoder_attention_mask": MASK,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
}


def batch_for(model):
    common = {"hidden_states": _randn(B, 1, 8, 8, seed=1), "timestep": torch.tensor([10, 900, 500])}
    return common | INPUTS[model.config._class_name]


def run(model):
    with torch.no_grad():
        return model(**batch_for(model)).sample


def both_ways(model):
    """Output fused and not; fails if a block is not fused where it should be, or runs other ops than it promises."""
    ditq.configure(model, fuse=False)
    assert ditq.execution_report(model).totals["fused_blocks"] == 0
    stock = run(model)
    ditq.configure(model, fuse=True)
    assert ditq.execution_report(model, batch_for(model)).totals["fused_blocks"] == BLOCKS
    return run(model), stock


# a low-rank branch beside 4 bits takes seconds to convert: once, as the attention knows nothing of it
@pytest.mark.parametrize("activations", ["token", "static"])
@pytest.mark.parametrize(
    ("method", "lora_rank", "weights", "attention"),
    [
        *product(("smoothquant", "htg"), (0,), ("w8", "w4p"), ("none", "int8", "bf16")),
        *product(("htg",), (4,), ("w8",), ("none", "int8", "bf16")),
        ("htg", 4, "w4p", "none"),
        *product(("smoothquant",), (0,), ("w4g",), ("none", "int8", "bf16")),
        ("htg", 4, "w4g", "int8"),
    ],
)
def test_fused_equals_stock_to_the_bit(make, method, lora_rank, weights, activations, attention):
    groups = 3 if method == "htg" else None
    model = make(
        Recipe(
            method,
            weights,
            activations,
            group_size=32,
            attention=attention,
            lora_rank=lora_rank,
            num_groups=groups,
        )
    )
    layer = model.transformer_blocks[1].get_submodule(FC1)
    assert (layer.format.groups, layer.format.lora_rank) == (groups or 1, lora_rank)
    fused, stock = both_ways(model)
    assert torch.equal(fused, stock)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("linear", "w8", "token"),
        CROSS_INT8,
        Recipe("meta", "w4p", "token", group_size=32, attention="bf16"),
        Recipe("ditas", "w8", "token", lora_rank=4),
        Recipe("ptq4dit", "w4p", "static", group_size=32),
        Recipe("htg", "w4p", "static", group_size=32, num_groups=3, lora_rank=4, attention="int8"),
        Recipe("htg", "w8", "static", num_groups=3, attention_scales="token", attention="int8"),
        Recipe("ditas", "w4g", "token", group_size=32, lora_rank=4),
        Recipe("meta", "w4g", "token", group_size=64, symmetric=True),
        Recipe("htg", "w4g", "static", group_size=32, num_groups=3, attention="int8"),
    ],
    ids=lambda recipe: f"{recipe.method}_{recipe.weights}_{recipe.activations}",
)
def test_fused_pixart_equals_stock_to_the_bit(make, recipe):
    """Every method's folds, padded captions, mixed timesteps and groups."""
    model = make(recipe, "pixart")
    groups = {m.format.groups for m in model.modules() if isinstance(m, QuantLinear)}
    assert max(groups) == (recipe.num_groups or 1)
    fused, stock = both_ways(model)
    assert torch.equal(fused, stock)


def test_a_mask_over_image_tokens_keeps_pixart_unfused_and_the_report_says_so(make):
    model, mask = make(CROSS_INT8, "pixart"), torch.ones(B, TOKENS)
    mask[:, 9:] = 0
    inputs = batch_for(model) | {"attention_mask": mask}
    report = ditq.execution_report(model, inputs)
    assert [row.note for row in report.blocks] == ["attention_mask given to the model"] * BLOCKS
    with torch.no_grad():
        assert not torch.equal(model(**inputs).sample, run(model))


def test_the_caption_and_its_mask_count(make):
    model = make(STATIC, "pixart")
    inputs, plain = batch_for(model), run(model)
    for change, seen in (
        ({"encoder_hidden_states": inputs["encoder_hidden_states"] * 1.5}, [True] * B),
        ({"encoder_attention_mask": MASK.roll(1, 0)}, [True] * B),
        ({"encoder_attention_mask": torch.ones_like(MASK)}, [False, True, True]),
    ):
        with torch.no_grad():
            changed = model(**inputs | change).sample
        assert [not torch.equal(a, b) for a, b in zip(changed, plain, strict=True)] == seen


@FAMILIES
@pytest.mark.parametrize(
    "field", ["shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"]
)
def test_every_part_of_the_modulation_counts(make, field, family):
    """Each at its own place: fused equals stock when one alone is changed, and the change shows."""
    block = make(STATIC, family).transformer_blocks[0]
    plain = _block(block, _modulation())
    changed = _modulation()
    setattr(changed, field, getattr(changed, field) * 1.25 + 0.1)
    fused = _block(block, changed)
    block.fusion.wanted = False
    assert torch.equal(fused, _block(block, changed))
    assert not torch.equal(fused, plain)


class _Parts:
    def rows(self):
        names = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
        return torch.cat([getattr(self, name) for name in names], dim=1)


def _modulation():
    """Six different random parts [B, D]."""
    g = torch.Generator().manual_seed(5)
    parts = _Parts()
    for name in ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"):
        setattr(parts, name, torch.randn(B, D, generator=g))
    return parts


def _block(block, modulation, dtype=torch.float32):
    here().hoisted = {block: modulation.rows()}
    caption = {}
    if block.attn2 is not None:
        caption["encoder_hidden_states"] = _randn(B, 6, D, seed=7).to(dtype)
        caption["encoder_attention_mask"] = ((1 - MASK.to(dtype)) * -10000.0)[:, None]
    with torch.no_grad():
        made = block(_randn(B, TOKENS, D, seed=6).to(dtype), **caption)
    here().hoisted = None
    return made


U = 2.0**-8  # unit roundoff of bf16
NOISE = 2.0**-20  # of everything in fp32, relative to the largest terms


@pytest.mark.parametrize(
    ("family", "attention"), [("dit", "attn1"), ("pixart", "attn2")], ids=["gated", "cross"]
)
def test_in_bf16_the_attention_half_differs_by_two_roundings(make, family, attention):
    """Stock rounds to_out's result y to bf16: u |gate y|. Both round their sums: u of either."""
    block = make(STATIC, family, torch_dtype=torch.bfloat16).transformer_blocks[0]
    m = _modulation()
    m.gate_mlp = torch.zeros(B, D)
    gate = m.gate_msa
    if attention == "attn2":
        m.gate_msa, gate = torch.zeros(B, D), torch.ones(B, D)
    seen = []
    fused = _block(block, m, torch.bfloat16).float()
    to_out = block.get_submodule(attention).to_out[0]
    to_out.register_forward_hook(lambda module, args, y: seen.append(y.float()))
    stock = _block(block, m, torch.bfloat16).float()
    gated = (gate[:, None] * seen[0]).abs() * (1 + U)
    bound = U * gated + U * (fused.abs() + stock.abs()) * (1 + U) + NOISE
    assert ((fused - stock).abs() <= bound).all()
    assert not torch.equal(fused, stock)


@pytest.mark.parametrize("recipe", [STATIC, Recipe("smoothquant", "w8", "token")])
def test_in_bf16_the_mlp_half_moves_codes_by_less_than_its_roundings(make, recipe):
    """Stock rounds fc1's result x (u |x|, times the slope of GELU, under 1.13) and the GELU (u |x|), before they are
    divided by the step: a code differs by that and by one for the two roundings to integers. A scale per token moves
    by 2.13 u, and so a code of up to 127 by 2.13 u 127 more."""
    block = make(recipe, torch_dtype=torch.bfloat16).transformer_blocks[0]
    m = _modulation()
    m.gate_msa = torch.zeros(B, D)
    seen = {}
    fused = _block(block, m, torch.bfloat16).float()
    fc1, fc2 = block.get_submodule(FC1), block.get_submodule(FC2)
    fc1.register_forward_hook(lambda module, args, y: seen.update(x=y.float()))
    fc2.register_forward_hook(lambda module, args, y: seen.update(read=args[0], y=y.float()))
    stock = _block(block, m, torch.bfloat16).float()
    codes = fc2.quantize(seen["read"].reshape(-1, 4 * D))
    step = codes.scale[:, None]
    smooth = torch.ones(4 * D) if fc2.site.smooth_inv is None else fc2.site.smooth_inv
    moved = 2.13 * U * (1 + U) * (seen["x"].reshape(-1, 4 * D).abs() * smooth / step) + 1
    if recipe.activations == "token":
        moved = moved + 2.13 * U * 127
    products = (moved * step) @ fc2.dequantized_weight().abs().t()
    if recipe.activations == "token":  # the step itself, on all codes
        products += 2.13 * U * step * (codes.q.float().abs() @ fc2.dequantized_weight().abs().t())
    y = products.reshape(B, TOKENS, D) + U * seen["y"].abs()
    bound = m.gate_mlp[:, None].abs() * y + U * (fused.abs() + stock.abs()) * (1 + U) + NOISE
    assert ((fused - stock).abs() <= bound).all()


ROWS = {  # ops of the linears of a block
    "static": {
        TO_Q: "adaln_quantize + gemm_w8a8",
        "attn1.to_k": "gemm_w8a8",
        TO_OUT: "quantize_static + gemm_residual",
        FC1: "adaln_quantize + gemm_gelu_quantize",
        FC2: "gemm_residual",
    },
    "token": {
        TO_Q: "adaln_quantize + gemm_w4a8",
        "attn1.to_k": "gemm_w4a8",
        TO_OUT: "quantize_per_token + gemm_residual",
        FC1: "adaln_quantize + gemm_w4a8",
        FC2: "gelu_quantize + gemm_residual",
    },
}
CROSS_ROWS = {
    "static": {
        "attn2.to_q": "quantize_static + gemm_w8a8",
        "attn2.to_k": "quantize_static + gemm_w8a8",
        "attn2.to_v": "gemm_w8a8",
        "attn2.to_out.0": "quantize_static + gemm_residual",
    },
    "token": {
        "attn2.to_q": "quantize_per_token + gemm_w4a8",
        "attn2.to_k": "quantize_per_token + gemm_w4a8",
        "attn2.to_v": "gemm_w4a8",
        "attn2.to_out.0": "quantize_per_token + gemm_residual",
    },
}


@FAMILIES
@pytest.mark.parametrize("recipe", [STATIC, TOKEN, REAL_GROUPS])
def test_the_report_names_the_fused_ops(make, recipe, family):
    model = make(recipe, family)
    report = ditq.execution_report(model)
    assert report.blocks == [BlockRun(f"transformer_blocks.{i}", True) for i in range(BLOCKS)]
    rows = {row.name: row for row in report.layers}
    expected = ROWS[recipe.activations] | (
        CROSS_ROWS[recipe.activations] if family == "pixart" else {}
    )
    if recipe is REAL_GROUPS:
        expected = {n: op.replace("w8a8", "w4a8_per_group") for n, op in expected.items()}
    layers = tuple(expected)
    assert {name: rows[f"{SECOND}.{name}"].op for name in layers} == expected
    assert {rows[f"{SECOND}.{name}"].note for name in layers} == {"fused"}
    assert "2 of 2 blocks fused" in str(report)
    assert str(report).count("not fused") == 0
    ditq.configure(model, fuse=False)
    stock = ditq.execution_report(model)
    changed = {"fused_blocks"}
    assert {k: v for k, v in report.totals.items() if k not in changed} == {
        k: v for k, v in stock.totals.items() if k not in changed
    }
    flops = {row.name: row.flops for row in stock.layers}
    assert {row.name: row.flops for row in report.layers} == flops
    assert [row.name for row in report.layers] == [row.name for row in stock.layers]
    assert [row.op for row in report.attention] == [row.op for row in stock.attention]
    assert [row.backend for row in report.layers] == [row.backend for row in stock.layers]


def _caption_site(model):
    layer = model.get_submodule(f"{SECOND}.attn2.to_v")
    layer.read(copy.deepcopy(layer.site))
    examine(model.get_submodule(SECOND))


def _site_probe(model):
    layer = model.get_submodule(f"{SECOND}.attn1.to_q")
    layer.site.register_forward_hook(lambda *_: None)


def _cross_probe(model):
    model.get_submodule(f"{SECOND}.attn2.to_out.0").register_forward_hook(lambda *_: None)


def _cross_processor(model):
    model.get_submodule(f"{SECOND}.attn2").set_processor(AttnProcessor())


def _adapter(model):
    state = {
        f"{SECOND}.{FC1}.lora_A.weight": torch.randn(2, D) / 8,
        f"{SECOND}.{FC1}.lora_B.weight": torch.randn(4 * D, 2),
    }
    ditq.load_lora(model, state)


def _probe(model):
    model.get_submodule(f"{SECOND}.norm3").register_forward_hook(lambda *_: None)


def _another_site(model):
    layer = model.get_submodule(f"{SECOND}.attn1.to_k")
    layer.read(copy.deepcopy(layer.site))
    examine(model.get_submodule(SECOND))


def _processor(model):
    model.get_submodule(f"{SECOND}.attn1").set_processor(AttnProcessor())


def _dropout(model):
    dropout = model.get_submodule(f"{SECOND}.attn1.to_out.1").train()
    dropout.p = 1.0


@pytest.mark.parametrize(
    ("family", "change", "note"),
    [
        ("dit", _adapter, f"{FC1} has a hook"),
        ("dit", _probe, "norm3 has a hook"),
        (
            "dit",
            _another_site,
            "to_q, to_k and to_v of attn1 quantize their input in different ways",
        ),
        ("dit", _site_probe, "attn1.to_q has a hook"),
        ("dit", _processor, "attn1 has a processor AttnProcessor"),
        ("dit", _dropout, "attn1.to_out.1 drops values in training"),
        ("pixart", _adapter, f"{FC1} has a hook"),
        ("pixart", _caption_site, "to_k and to_v of attn2 quantize their input in different ways"),
        ("pixart", _cross_probe, "attn2.to_out.0 has a hook"),
        ("pixart", _cross_processor, "attn2 has a processor AttnProcessor"),
    ],
)
def test_a_block_that_cannot_falls_back_and_shows(make, family, change, note):
    """The changed block runs as ever, the other one fused, and the output is that of no fusing at all."""
    torch.manual_seed(0)
    model, stock = make(STATIC, family), make(STATIC, family)
    ditq.configure(stock, fuse=False)
    for each in (model, stock):
        torch.manual_seed(0)
        change(each)
    report = ditq.execution_report(model)
    assert [(row.fused, row.note.startswith(note)) for row in report.blocks] == [
        (True, False),
        (False, True),
    ]
    told = [line.split(maxsplit=1) for line in str(report).splitlines()]
    assert any(line[0] == SECOND and line[1].startswith(f"not fused: {note}") for line in told)
    assert torch.equal(run(model), run(stock))


def test_a_block_fuses_again_when_its_adapter_is_gone(make):
    model = make(STATIC)
    expected = run(model)
    _adapter(model)
    assert not torch.equal(run(model), expected)
    ditq.unload_lora(model)
    assert ditq.execution_report(model).totals["fused_blocks"] == BLOCKS
    assert torch.equal(run(model), expected)


def test_arguments_of_the_attention_processor_are_not_dropped(make):
    model = make(Recipe("smoothquant", "w8", "token", attention="int8"))
    block = model.transformer_blocks[0]
    hidden, mask = torch.randn(B, TOKENS, D), torch.ones(B, TOKENS, dtype=torch.bool)
    mask[:, 9:] = False
    step = {"timestep": torch.tensor([1, 2, 3]), "class_labels": torch.tensor([1, 2, 3])}
    with torch.no_grad():
        masked, plain = block(hidden, attention_mask=mask, **step), block(hidden, **step)
    assert not torch.equal(masked, plain)


def test_a_layer_left_in_float_is_refused_and_runs_as_ever(make):
    model = make(Recipe("smoothquant", "w8", "token", keep=("*.ff.net.2",)))
    sentence = r"configure: fuse=True is not possible, .*ff\.net\.2 is (fp32|a Linear)"
    with pytest.raises(ValueError, match=sentence):
        ditq.configure(model, fuse=True)
    report = ditq.execution_report(model)
    assert report.totals["fused_blocks"] == 0
    assert all(row.note for row in report.blocks)


def test_a_family_without_fused_blocks_is_refused(tmp_path):
    CLASSES["AuraFlowTransformer2DModel"].build().save_pretrained(tmp_path)
    config = ditq.DitqConfig(weights="w8")
    model = AuraFlowTransformer2DModel.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match="AuraFlowTransformer2DModel: it has no fused blocks"):
        ditq.configure(model, fuse=True)
    ditq.configure(model, fuse=False)


def test_the_switch_stays_as_it_was_set(make):
    model = make(STATIC)
    ditq.configure(model, fuse=False)
    ditq.configure(model)
    report = ditq.execution_report(model)
    assert {row.note for row in report.blocks} == {"switched off with configure(fuse=False)"}
    other = copy.deepcopy(model)
    ditq.configure(other, fuse=True)
    assert ditq.execution_report(other).totals["fused_blocks"] == BLOCKS
    assert ditq.execution_report(model).totals["fused_blocks"] == 0
    assert torch.equal(run(other), run(model))


@FAMILIES
def test_saved_and_loaded_it_fuses_again(make, tmp_path, family):
    model = make(TOKEN, family)
    keys = set(model.state_dict())
    model.save_pretrained(tmp_path)
    again = MODELS[family].from_pretrained(tmp_path)
    assert set(again.state_dict()) == keys
    assert ditq.execution_report(again).totals["fused_blocks"] == BLOCKS
    assert torch.equal(run(again), run(model))
    assert type(again.transformer_blocks[0]).__name__ == "BasicTransformerBlock"


@FAMILIES
def test_offloaded_layer_by_layer_it_runs_as_ever(make, family):
    model = make(STATIC, family)
    expected = run(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.transformer_blocks.parameters())
    assert torch.equal(run(model), expected)
    ditq.configure(model, fuse=False)
    with pytest.raises(ValueError, match="has a hook"):
        ditq.configure(model, fuse=True)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    ditq.configure(model, fuse=True)
    assert ditq.execution_report(model).totals["fused_blocks"] == BLOCKS
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize(("level", "fused"), [("block_level", BLOCKS), ("leaf_level", 0)])
def test_offloaded_in_groups_pixart_fuses_where_a_block_is_whole(make, level, fused):
    model = make(STATIC, "pixart")
    expected = run(model)
    size = {"num_blocks_per_group": 1} if level == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), offload_type=level, **size)
    assert ditq.execution_report(model).totals["fused_blocks"] == fused
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize(("family", "recipe"), [("dit", TOKEN), ("pixart", CROSS_INT8)])
def test_compiled_whole_it_is_one_graph_of_fused_ops(make, family, recipe):
    model, graphs = make(recipe, family), []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        assert torch.equal(run(compiled), run(model))
    torch.compiler.reset()
    assert len(graphs) == 1
    count = {op: sum(op in t for t in graphs[0]) for op in ("adaln_quantize", "gemm_residual")}
    residuals = 2 if family == "dit" else 3
    assert count == {"adaln_quantize": 2 * BLOCKS, "gemm_residual": residuals * BLOCKS}
    one_gemm = sum("gemm_qkv_quantize" in target for target in graphs[0])
    assert one_gemm == (BLOCKS if recipe is CROSS_INT8 else 0)


def _float_residual(self, residual, gate, codes):
    y = codes.q.float() @ self.dequantized_weight().t() * codes.scale[:, None]
    return residual + gate.repeat_interleave(len(y) // len(gate), 0) * y


def test_a_promised_fused_op_that_does_not_run_is_a_fallback(make, monkeypatch):
    model = make(TOKEN)
    monkeypatch.setattr(QuantLinear, "add_to", _float_residual)
    with pytest.raises(ditq.FallbackError, match=r"blocks\.0: fused, expected .* but .*aten\.mm"):
        ditq.execution_report(model)


def test_the_weights_of_another_layer_are_a_fallback(make, monkeypatch):
    model = make(STATIC)
    attn = model.transformer_blocks[1].attn1
    monkeypatch.setattr(attn.to_k, "multiply", attn.to_v.multiply)
    with pytest.raises(
        ditq.FallbackError,
        match=r"blocks\.1\.attn1\.to_k: its gemm_w8a8 ran on the weights of .*to_v",
    ):
        ditq.execution_report(model)


def test_a_block_that_does_nothing_is_a_fallback(make, monkeypatch):
    model = make(STATIC)
    monkeypatch.setattr(Layout, "forward", lambda self, block, hidden, m: hidden)
    with pytest.raises(ditq.FallbackError, match=r"expected adaln_quantize .* but nothing ran"):
        ditq.execution_report(model)


FLOAT_STEPS = (
    2.0**-20
)  # of a token's largest: what norms summed in another order and another GELU may differ by


@pytest.mark.parametrize("recipe", [STATIC, TOKEN])
def test_float_steps_cost_less_than_sixteen_times_larger_ones(make, recipe, cost_of_sums):
    """Codes move by one as often as their input errs, so the error of a result grows with the root: by 4 here. A
    handful of codes move at 2**-20 and scatter; this leaves them room, and is what the test on a GPU goes by."""
    larger = cost_of_sums(lambda: make(recipe), run, 16 * FLOAT_STEPS)
    assert 0 < cost_of_sums(lambda: make(recipe), run, FLOAT_STEPS) < larger < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@FAMILIES
@pytest.mark.parametrize("recipe", [STATIC, TOKEN, REAL_GROUPS])
def test_on_a_gpu_fused_is_near_stock(make, recipe, family, cost_of_sums):
    """Integer sums are exact and their epilogues round alike; the float steps before a quantizer differ."""
    outputs, bound = {}, cost_of_sums(lambda: make(recipe, family), run, 16 * FLOAT_STEPS)
    model = make(recipe, family).to("cuda")
    inputs = tree_map_only(torch.Tensor, lambda x: x.cuda(), batch_for(model))
    for fuse in (True, False):
        ditq.configure(model, linear="triton", fuse=fuse)
        with torch.no_grad():
            outputs[fuse] = model(**inputs).sample
    assert (outputs[True] - outputs[False]).norm() / outputs[False].norm() < bound

"""Transformers without a table: integer linears in diffusers' own blocks, converted without data."""

import json

import diffusers
import pytest
import torch
from torch import nn

from ditq_converters import Recipe, calibrate, convert
from ditq_converters.plan.make import make_plan
from ditq_converters.sites import family_for
from ditq_runtime import CheckpointError, QuantLinear, execution_report
from ditq_runtime.families import FAMILIES, family_of
from ditq_runtime.families.generic import generic_family

WIDTH = 64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def auraflow():
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=WIDTH, out_channels=4,
        pos_embed_max_size=64,
    )  # fmt: skip
    timestep = torch.tensor([0.9, 0.1])
    inputs = {"hidden_states": randn(2, 4, 16, 16), "encoder_hidden_states": randn(2, 6, 32)}
    return model, {**inputs, "timestep": timestep}


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=32,
        text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=4, max_text_seq_length=6,
        patch_size=2,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 1, 4, 8, 8), "encoder_hidden_states": randn(2, 6, 32)}
    return model, {**inputs, "timestep": torch.tensor([900, 30])}


def hunyuandit():
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=WIDTH,
        num_layers=2, cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=32, text_len=4,
        text_len_t5=4, activation_fn="gelu-approximate",
    )  # fmt: skip
    frequencies = (randn(16, 16).cos(), randn(16, 16).sin())
    text = {
        "encoder_hidden_states": randn(2, 4, 32),
        "text_embedding_mask": torch.ones(2, 4),
        "encoder_hidden_states_t5": randn(2, 4, 32),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "image_meta_size": torch.tensor([[16.0] * 6] * 2),
        "style": torch.zeros(2, dtype=torch.long),
    }
    latents = randn(2, 4, 8, 8)
    return model, {
        "hidden_states": latents,
        "timestep": torch.tensor([900.0, 30.0]),
        "image_rotary_emb": frequencies,
        **text,
    }


def lumina2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=WIDTH, num_layers=2, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=32, ffn_dim_multiplier=1.0, norm_eps=1e-5,
        scaling_factor=1.0, axes_dim_rope=(4, 6, 6), axes_lens=(64, 32, 32), cap_feat_dim=32,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 16, 16), "encoder_hidden_states": randn(2, 6, 32)}
    mask = torch.ones(2, 6, dtype=torch.bool)
    return model, {**inputs, "timestep": torch.tensor([0.9, 0.1]), "encoder_attention_mask": mask}


BUILD = {f.__name__: f for f in (auraflow, cogvideox, hunyuandit, lumina2)}
RECIPE = Recipe("linear", "w8", "token")


@pytest.fixture(params=BUILD, scope="module")
def case(request):
    """A random tiny model in eval mode, and a batch of two."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = BUILD[request.param]()
        for parameter in model.parameters():  # zero-initialized modulations would hide the blocks
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False), inputs


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def test_blocks_are_integers_and_all_else_is_as_it_was(case):
    model, _ = case
    packed = convert(model, RECIPE, quiet=True)
    integer = {n for n, m in packed.named_modules() if isinstance(m, QuantLinear)}
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    attention = {n for n in linears if ".to_q" in n or ".to_out.0" in n}
    assert attention
    assert {n for n in attention if "emb" not in n} <= integer <= linears
    assert not [n for n in integer if "emb" in n or n.startswith(("proj_out", "norm_out"))]
    for entry in make_plan(model, method="linear").linears:
        assert (entry.weights == "w8") == (entry.name in integer)
        assert entry.weights == "w8" or (entry.weights == "as it is" and "float" in entry.reason)
        if entry.site == "modulation":
            assert entry.activations == "none"


def test_one_forward_errs_as_its_codes_do(case, cost_of_codes):
    """No less than sqrt(1 / 2) and no more than sqrt(2) times: see `cost_of_codes`."""
    model, inputs = case
    packed = convert(model, RECIPE, quiet=True)
    expected, got = run(model, inputs), run(packed, inputs)
    error = float((got - expected).norm() / expected.norm())
    assert 0.5**0.5 < error / cost_of_codes(model, packed, inputs) < 2**0.5


def test_saved_and_loaded_by_the_stock_class_it_is_the_same_function(case, tmp_path):
    model, inputs = case
    packed = convert(model, RECIPE, out=tmp_path / "out", quiet=True)
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(run(loaded, inputs), run(packed, inputs))
    loaded.save_pretrained(tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    half = type(model).from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    linear = next(m for m in half.modules() if isinstance(m, QuantLinear))
    assert (linear.weight_scale.dtype, linear.compute_dtype) == (torch.float32, torch.bfloat16)


def test_the_report_proves_integers_given_inputs(case):
    model, inputs = case
    packed = convert(model, RECIPE, quiet=True)
    report = execution_report(packed, inputs)
    assert report.totals["integer_flops_share"] > 0.5
    assert {r.note for r in report.layers if not r.integer and r.weights == "float32"} <= set(
        generic_family("").kept.values()
    )
    with pytest.raises(ValueError, match="pass its keyword arguments as inputs"):
        execution_report(packed)


def test_an_own_loop_calibrates_any_class(case, tmp_path):
    model, inputs = case
    stats = calibrate(model, tmp_path / "stats", run=lambda model: model(**inputs), quiet=True)
    assert stats.timesteps == [pytest.approx(float(inputs["timestep"].max()))]
    for block, table in family_for(model, inputs).block_tables(model).items():
        for site in table.sites:
            low, high = stats.ranges(f"{block}.{site.name}")
            assert low.shape == (1, model.get_submodule(f"{block}.{site.consumers[0]}").in_features)
            assert bool((low <= high).all())
    with pytest.raises(ValueError, match=r"needs inputs: prompts|no telling which"):
        calibrate(model, tmp_path / "none")
    with pytest.raises(ValueError, match=r"needs statistics|pass its keyword arguments as inputs"):
        convert(model, Recipe("smoothquant"), quiet=True)


def test_a_damaged_checkpoint_is_refused(case, tmp_path, monkeypatch):
    """Also where nobody looks at digests, which would tell first."""
    monkeypatch.setenv("DITQ_VERIFY", "0")
    model, _ = case
    convert(model, RECIPE, out=tmp_path / "out", quiet=True)
    config = tmp_path / "out" / "config.json"
    content = json.loads(config.read_text())
    content["quantization_config"]["scheme"]["layers"].popitem()
    config.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint|unknown tensor"):
        type(model).from_pretrained(tmp_path / "out")


def test_subclasses_of_linear_and_lists_without_blocks_are_left_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)  # reads its out_proj.weight without calling it
            self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
            self.gate, self.img_mod = nn.Linear(8, 2), nn.Sequential(nn.SiLU(), nn.Linear(8, 48))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.time_embedders = nn.ModuleList([Block()])
            self.projections = nn.ModuleList([nn.Linear(8, 8)])
            self.inner = nn.Module()
            self.inner.layers = nn.ModuleList([Block(), Block()])

    tables = generic_family("Model").block_tables(Model())
    assert list(tables) == ["inner.layers.0", "inner.layers.1"]
    for table in tables.values():
        assert [site.name for site in table.sites] == ["fc1", "fc2"]
        assert list(table.modulations) == ["img_mod.1"]
    with pytest.raises(ValueError, match="no list of repeated blocks"):
        generic_family("Linear").block_tables(nn.Linear(2, 2))


def test_every_transformer_of_diffusers_has_a_row():
    names = [n for n in dir(diffusers) if n.endswith(("Transformer2DModel", "Transformer3DModel"))]
    assert len(names) > 30
    for name in names:
        family = family_of(name)
        assert family.architecture == name
        assert (family.example_inputs is None) == (name not in FAMILIES)

"""The DiT table names what is in a real model, and the packed block is the stock block."""

import copy

import pytest
import torch
from torch import nn

from ditq_runtime.families import FAMILIES, AdaLN, OnTheFly, ValueRows, family_of
from ditq_runtime.families.adaln import modulate
from ditq_runtime.families.dit import BLOCK, DIT, use_direct_multiplier
from ditq_runtime.host.skeleton import share_embedder

WIDTH = 64


def test_every_name_of_the_table_is_a_linear_of_a_real_model(build_model):
    model = build_model()
    assert DIT.block_names(model) == ["transformer_blocks.0", "transformer_blocks.1"]
    for name in DIT.block_names(model):
        block = model.get_submodule(name)
        listed = [consumer for site in BLOCK.sites for consumer in site.consumers]
        listed += BLOCK.modulations
        linears = {
            n
            for n, m in block.named_modules()
            if isinstance(m, nn.Linear) and not n.startswith(f"{DIT.shared_embedder}.")
        }
        assert sorted(listed) == sorted(linears)  # all of them, each once
        for modulation, chunks in BLOCK.modulations.items():
            assert block.get_submodule(modulation).out_features == chunks * WIDTH
        for site in BLOCK.sites:
            inputs = {block.get_submodule(consumer).in_features for consumer in site.consumers}
            assert len(inputs) == 1
            if isinstance(site.producer, AdaLN):
                chunks = BLOCK.modulations[site.producer.modulation]
                assert {site.producer.shift_chunk, site.producer.scale_chunk} < set(range(chunks))
            if isinstance(site.producer, ValueRows):
                (value,) = site.producer.values
                assert block.get_submodule(value).out_features == inputs.pop()
            if isinstance(site.producer, OnTheFly):
                assert site.producer.reason
    outside = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and not n.startswith("transformer_blocks")
    ]
    assert set(outside) <= {*DIT.kept, DIT.final_modulation}


def test_consumers_of_a_site_read_one_tensor(build_model):
    model = build_model()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0]})
            )
    model(**DIT.example_inputs(model))
    for block in DIT.block_names(model):
        for site in BLOCK.sites:
            first, *others = (seen[f"{block}.{consumer}"] for consumer in site.consumers)
            assert all(torch.equal(first, other) for other in others)


def test_example_inputs_fit_the_model(build_model):
    model = build_model().to(torch.bfloat16)
    inputs = DIT.example_inputs(model)
    assert inputs["hidden_states"].shape == (1, 1, 8, 8)
    assert inputs["hidden_states"].dtype == torch.bfloat16
    assert torch.equal(inputs["hidden_states"], DIT.example_inputs(model)["hidden_states"])
    assert model(**inputs).sample.shape == (1, 1, 8, 8)


def test_unknown_architectures_are_refused_with_the_known_ones():
    assert family_of("DiTTransformer2DModel") is DIT
    for name in ("UNet2DModel", "", "dittransformer2dmodel", "annotations"):
        with pytest.raises(ValueError, match=r"no family adapter; supported .*DiTTransformer2DMod"):
            family_of(name)
    assert all(name == family.architecture for name, family in FAMILIES.items())


def _decibels(signal, got):
    return float(10 * torch.log10(signal.square().sum() / (got.double() - signal).square().sum()))


@pytest.mark.parity("P2")
@pytest.mark.parametrize("smooth", [1.0, 10.0, 100.0])
def test_a_direct_multiplier_is_precise_at_any_smoothing_factor(smooth):
    # The runtime's multiplier is fp32. Even one rounded to bf16, error uniform in a step of 2**-7 of its
    # binade's lower end, keeps -20 log10(2**-7 / sqrt(12) * 0.72) = 56 dB; storing (1 + scale) / s - 1 cancels.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 500, WIDTH, generator=generator).bfloat16()
    s = smooth * (0.5 + torch.rand(WIDTH, generator=generator, dtype=torch.float64))
    multiplier = (1 + 0.4 * torch.randn(2, WIDTH, generator=generator, dtype=torch.float64)) / s
    shift = 0.3 * torch.randn(2, WIDTH, generator=generator, dtype=torch.float64) / s
    norm = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)

    wide = hidden.double()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = normed * multiplier[:, None] + shift[:, None]

    got = modulate(hidden, norm, multiplier.float(), shift.float())
    assert got.dtype == torch.float32
    assert _decibels(expected, got) > 120  # fp32 throughout: nothing is rounded to bf16 on the way
    assert _decibels(expected, modulate(hidden, norm, multiplier.bfloat16(), shift.bfloat16())) > 54
    stock = (1 + (multiplier - 1).bfloat16())[:, None] * normed + shift.bfloat16()[:, None]
    if smooth == 100:
        assert _decibels(expected, stock) < 30  # what the direct form avoids


@pytest.mark.parity("P2")
@pytest.mark.parametrize("smooth", [1.0, 10.0, 100.0])
def test_a_folded_factor_costs_no_precision_beside_one_applied_on_the_fly(smooth):
    """LN(h) a + b with a = (1 + scale) / s from bf16 hidden states, against (LN(h) (1 + scale) + shift) u in fp32."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 500, WIDTH, generator=generator).bfloat16()
    s = smooth * (0.5 + torch.rand(WIDTH, generator=generator, dtype=torch.float64))
    scale = 1 + 0.4 * torch.randn(2, WIDTH, generator=generator, dtype=torch.float64)
    shift = 0.3 * torch.randn(2, WIDTH, generator=generator, dtype=torch.float64)
    norm = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
    exact = modulate(hidden.double(), norm, scale / s, shift / s)
    folded = modulate(hidden, norm, (scale / s).float(), (shift / s).float())
    on_the_fly = modulate(hidden, norm, scale.float(), shift.float()) * (1 / s).float()
    assert _decibels(exact, folded) > _decibels(exact, on_the_fly) - 1


@pytest.mark.parametrize("affine", [False, True])
def test_modulate_in_fp64_with_and_without_affine_parameters(affine):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    a, b, weight, bias = torch.randn(4, 2, 8, generator=generator, dtype=torch.float64)
    norm = nn.LayerNorm(8, eps=1e-5, elementwise_affine=affine).double()
    centred = hidden - hidden.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if affine:
        norm.weight.data, norm.bias.data = weight[0], bias[0]
        expected = expected * weight[0] + bias[0]
    expected = expected * a[:, None] + b[:, None]
    got = modulate(hidden, norm, a, b)
    assert got.dtype == torch.float64
    assert (got - expected).abs().max() < 1e-12


def test_an_affine_norm_in_half_precision_is_computed_in_fp32():
    norm = nn.LayerNorm(8).bfloat16()
    hidden = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    one, zero = torch.ones(1, 8), torch.zeros(1, 8)
    expected = nn.functional.layer_norm(hidden.float(), (8,))
    assert torch.equal(modulate(hidden, norm, one, zero), expected)


def _block(build_model):
    block = build_model().transformer_blocks[0].double()
    direct = copy.deepcopy(block)
    use_direct_multiplier(direct)
    for chunk in (1, 4):  # scale_msa, scale_mlp
        direct.norm1.linear.bias.data[chunk * WIDTH : (chunk + 1) * WIDTH] += 1
    return block, direct


def _block_inputs():
    hidden = torch.randn(
        3, 16, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return {
        "hidden_states": hidden,
        "timestep": torch.tensor([0, 500, 999]),
        "class_labels": torch.tensor([1, 999, 1000]),
    }


def test_the_packed_block_is_the_stock_block_with_one_in_its_bias(build_model):
    stock, direct = _block(build_model)
    expected = stock(**_block_inputs())
    assert (direct(**_block_inputs()) - expected).abs().max() < 1e-12
    assert (
        expected - _block_inputs()["hidden_states"]
    ).abs().max() > 0.1  # the block does something


def test_the_swapped_class_keeps_its_name_copies_and_is_made_once(build_model):
    stock, direct = _block(build_model)
    assert type(direct) is not type(stock)
    assert issubclass(type(direct), type(stock))
    assert type(direct).__name__ == type(stock).__name__
    twin = copy.deepcopy(direct)
    assert type(twin) is type(direct)
    assert torch.equal(twin(**_block_inputs()), direct(**_block_inputs()))
    again = copy.deepcopy(stock)
    use_direct_multiplier(again)
    assert type(again) is type(direct)


def test_a_block_stays_in_the_dtype_of_its_residual_stream(build_model):
    block = _block(build_model)[1].bfloat16()
    inputs = _block_inputs()
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    block.attn1 = block.attn1.float()  # packed linears take the fp32 that modulate gives
    block.ff = block.ff.float()
    assert block(**inputs).dtype == torch.bfloat16


def test_cross_attention_inputs_are_refused_and_not_dropped(build_model):
    direct = _block(build_model)[1]
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        with pytest.raises(ValueError, match="DiT blocks have no cross-attention"):
            direct(**_block_inputs(), **{name: torch.zeros(3, 2, WIDTH, dtype=torch.float64)})


def test_an_attention_mask_masks(build_model):
    direct = _block(build_model)[1]
    mask = torch.zeros(3, 1, 16, dtype=torch.float64)
    mask[..., 8:] = -torch.inf
    free, masked = direct(**_block_inputs()), direct(**_block_inputs(), attention_mask=mask)
    assert (free - masked).abs().max() > 1e-6
    inputs = _block_inputs()
    inputs["hidden_states"][:, 8:] = 7.0  # what is masked does not reach the other tokens
    assert torch.allclose(direct(**inputs, attention_mask=mask)[:, :8], masked[:, :8], atol=1e-12)


def test_one_embedder_for_all_blocks(build_model, forward):
    model = build_model(shared=True, num_layers=3)
    assert DIT.embedder_prefixes(model) == [f"transformer_blocks.{i}.norm1.emb" for i in range(3)]
    expected = forward(model)
    share_embedder(model, DIT)
    embedders = {id(block.norm1.emb) for block in model.transformer_blocks}
    assert embedders == {id(model.transformer_blocks[0].norm1.emb)}
    assert torch.equal(forward(model), expected)

"""Learned rounding: the codes that it may choose, what it gains on a block, and that a killed run goes on."""

import sys
from dataclasses import replace

import pytest
import torch

import ditq_kernels as k
from ditq_converters import Recipe, calibrate, convert
from ditq_converters.convert.emulated import Emulated, playable
from ditq_converters.convert.fold import LinearTensors
from ditq_converters.convert.jobs import Job, checked_plan, prefix_of
from ditq_converters.convert.learned import Grid, Learned
from ditq_converters.convert.quantize import quantize_linear
from ditq_converters.convert.reconstruct import reconstruct
from ditq_converters.convert.story import LOG
from ditq_converters.methods import Transform
from ditq_converters.streaming.finished import folder_of
from ditq_runtime.format.layer import LayerFormat

LEARNED = {
    "method": "osplus", "weights": "w4p", "activations": "token_asym", "bias_correction": True,
    "rounding": "reconstruct", "iterations": 60,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(make_dit):
    return make_dit(2)


@pytest.fixture(scope="module")
def stats(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stats") / "stats"
    return calibrate(model, out=folder, steps=4, samples=2, rows=32, quiet=True)


def weights():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 3
    return {
        "w8": k.quantize_weight_w8(weight),
        "w4p": k.quantize_weight_w4p(weight, 32),
        "w4g": k.quantize_weight_w4g(weight, 32),
    }


@pytest.mark.parametrize("name", ["w8", "w4p", "w4g"])
def test_a_grid_says_what_codes_stand_for(name):
    """Against the packed weight's own expansion, for its codes and for others of the grid."""
    weight = weights()[name]
    grid = Grid.of(weight)
    for codes in (grid.code, grid.lowest, grid.highest):
        packed = weight.with_codes(codes.to(torch.int8 if name == "w8" else torch.uint8))
        real = grid.base + grid.step * codes
        # an fp32 product and sum against one product: a few ulp of the largest term
        torch.testing.assert_close(real, packed.dequantize(), rtol=1e-5, atol=1e-5)
    integers = weight.with_codes(grid.highest.to(torch.int8 if name == "w8" else torch.uint8))
    assert int(integers.expand().to(torch.int32).abs().max()) <= 127


@pytest.mark.parametrize("name", ["w8", "w4p", "w4g"])
def test_neighbours_are_the_code_and_the_one_towards_the_target(name):
    grid = Grid.of(weights()[name])
    generator = torch.Generator().manual_seed(1)
    target = grid.base + grid.step * (grid.code + torch.randn(6, 64, generator=generator))
    low, place = grid.neighbours(target)
    for n, c in ((n, c) for n in range(6) for c in range(64)):
        code, least, most = (float(part[n, c]) for part in (grid.code, grid.lowest, grid.highest))
        wanted = float((target[n, c] - grid.base[n, c]) / grid.step[n, c])
        other = code - 1 if wanted < code else code + 1
        if not least <= other <= most:
            other = 2 * code - other
        assert float(low[n, c]) == min(code, other)
        assert float(place[n, c]) == pytest.approx(
            min(max(wanted - min(code, other), 0), 1), abs=1e-4
        )


@pytest.mark.parametrize("activations", ["token", "token_asym", "static"])
@pytest.mark.parametrize("rank", [0, 4])
def test_undecided_codes_are_the_only_difference_to_the_packed_linear(activations, rank):
    """With every h at 0 or 1 the stand-in computes what the integers do, and its gradient reaches codes and step."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    layer_format = LayerFormat("w4p", activations, 32, lora_rank=rank)
    stored = quantize_linear(LinearTensors(weight, torch.ones(1, 32).double()), layer_format)
    quantizer = {}
    if activations == "static":
        scale, zero = k.asymmetric_scale(torch.tensor(-3.0), torch.tensor(5.0))
        quantizer = {"act_scale": scale.reshape(1), "act_zero": zero.reshape(1)}
    emulated = Emulated(playable(64, 32, layer_format, stored, quantizer), Transform(), None)
    step = torch.nn.Parameter(quantizer["act_scale"].log()) if quantizer else None
    learned = Learned(emulated, weight, step)
    codes = learned.codes()
    learned.v.data = torch.where(codes > learned._low, 9.0, -9.0)
    x = torch.randn(5, 64, generator=generator)
    # fp32 sums of 64 terms of size 10 in another order; the packed branch keeps its 4 products in bf16, off by at most
    # 2^-9 of numbers below 2, and multiplies them by numbers below 1
    bound = 1e-3 + rank * 2 * 2**-9
    torch.testing.assert_close(learned(x).detach(), emulated(x), rtol=1e-4, atol=bound)
    learned.v.data.zero_()
    learned(x).square().sum().backward()
    assert bool((learned.v.grad != 0).any())
    assert step is None or float(step.grad) != 0


def inside(model, stats, block, **choices):
    """A job whose next part is a block, and what rounding knows inside it."""
    recipe = Recipe(**{**LEARNED, **choices})
    plan, family = checked_plan(recipe, "transformer", model, None, True)
    job = Job(model, model, family, plan, stats, True)
    return replace(job, before=prefix_of(job))


def block_error(job, block):
    """Of the copy's block against the float model's, in plain torch, at the calls that were kept."""
    total = 0.0
    for call in job.stats.replay():
        given = []
        for module in (job.model, job.before.seen):
            handle = module.get_submodule(block).register_forward_hook(
                lambda module, args, output, given=given: given.append(output)
            )
            call.replay(module)
            handle.remove()
        total += float((given[0] - given[1]).square().sum())
    return total


def test_learning_lowers_the_error_of_the_block(model, stats, monkeypatch):
    """Few and long steps, for the test's sake."""
    monkeypatch.setitem(vars(sys.modules[reconstruct.__module__]), "CODE_RATE", 0.15)
    monkeypatch.setitem(  # all are judged by the calls that they read
        vars(sys.modules[prefix_of.__module__]), "ask_all_classes", lambda model, calls: calls
    )
    block, found = "transformer_blocks.0", {}
    for rounding in ("nearest", "aimed", "reconstruct"):
        job = inside(model, stats, block, rounding=rounding)
        if job.before is None:
            job = replace(job, before=inside(model, stats, block).before)
        before = torch.get_rng_state()
        packed = job.convert_part(block)
        assert torch.equal(torch.get_rng_state(), before)
        found[rounding] = block_error(job, block), packed
    errors = {name: error for name, (error, _) in found.items()}
    assert errors["reconstruct"] < errors["aimed"] < errors["nearest"]
    assert errors["reconstruct"] < errors["nearest"] / 4
    aimed, learned = found["aimed"][1].tensors, found["reconstruct"][1].tensors
    changed = {name for name in aimed if not torch.equal(aimed[name], learned[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"weight", "bias", "weight_sum"}
    assert not any(name.startswith(f"{block}.norm1") for name in changed)
    assert all(p.grad is None for p in model.parameters())


def test_a_static_step_is_shared_by_its_readers_and_stored_once(model, stats, monkeypatch):
    """Whatever it is worth: here every result is kept."""
    errors = iter((1.0, 0.5))
    place = vars(sys.modules[reconstruct.__module__])
    monkeypatch.setitem(place, "_error", lambda prefix, wanted: next(errors))
    block, found = "transformer_blocks.0", {}
    for rounding in ("aimed", "reconstruct"):
        job = inside(model, stats, block, rounding=rounding, activations="static", iterations=4)
        found[rounding] = job.convert_part(block).tensors
    sites = [name for name in found["aimed"] if name.endswith(".act_scale")]
    assert len(sites) == 4
    for name in sites:
        ratio = float(found["reconstruct"][name] / found["aimed"][name])
        # 4 steps of Adam move a logarithm by at most 4 * 4e-5
        assert 0 < abs(ratio - 1) <= 1.7e-4
    q, k_, v = (
        job.before.seen.get_submodule(f"{block}.attn1.{name}").site.act_scale
        for name in ("to_q", "to_k", "to_v")
    )
    assert torch.equal(q, k_)
    assert torch.equal(q, v)


def test_too_wide_a_step_is_pulled_down():
    """Of inputs within one: 8 bits over a range of 40 instead of 2."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    stored = quantize_linear(LinearTensors(weight, None), LayerFormat("w8", "static", bias=False))
    scale, zero = k.asymmetric_scale(torch.tensor(-20.0), torch.tensor(20.0))
    quantizer = {"act_scale": scale.reshape(1), "act_zero": zero.reshape(1)}
    layer = playable(64, 32, LayerFormat("w8", "static", bias=False), stored, quantizer)
    step = torch.nn.Parameter(quantizer["act_scale"].log())
    x = 2 * torch.rand(200, 64, generator=generator) - 1
    learned = Learned(Emulated(layer, Transform(), None), weight, step)
    (learned(x) - x @ weight.float().T).square().sum().backward()
    assert float(step.grad) > 0


def test_the_same_seed_learns_the_same(model, stats):
    one, other = (
        inside(model, stats, "transformer_blocks.0", iterations=8).convert_part(
            "transformer_blocks.0"
        )
        for _ in range(2)
    )
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_a_killed_run_goes_on_and_writes_the_same_bytes(model, stats, tmp_path, monkeypatch):
    recipe = Recipe(**{**LEARNED, "iterations": 8})
    convert(model, recipe, stats, tmp_path / "whole", quiet=True)
    real, seen = Job.convert_part, []

    def dies(self, name, log=None):
        seen.append(name)
        if name == "transformer_blocks.1" and seen.count(name) == 1:
            raise KeyboardInterrupt
        return real(self, name, log)

    monkeypatch.setattr(Job, "convert_part", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(model, recipe, stats, tmp_path / "killed", quiet=True)
    kept = folder_of(tmp_path / "killed")
    log = (kept / "transformer" / LOG).read_text()
    assert "transformer_blocks.0: iteration 8 of 8" in log
    assert "transformer_blocks.0 done; 1 of 3" in log
    assert "ETA" in log
    convert(model, recipe, stats, tmp_path / "killed", quiet=True)
    assert seen.count("transformer_blocks.0") == 1
    assert not kept.exists()
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_stand_in_moves_with_all_its_tensors():
    stored = quantize_linear(
        LinearTensors(torch.ones(32, 64).double(), None), LayerFormat("w8", "static", bias=False)
    )
    one = torch.ones(1)
    quantizer = {"act_scale": one, "act_zero": torch.zeros(1, dtype=torch.int32)}
    layer = playable(64, 32, LayerFormat("w8", "static", bias=False), stored, quantizer)
    transform = Transform(torch.ones(64).double(), torch.zeros(1, 64).double())
    moved = Emulated(layer, transform, None).to("meta")
    assert {tensor.device.type for tensor in (*moved.parameters(), *moved.buffers())} == {"meta"}
    assert moved.layer.site.act_scale.is_meta


def test_what_cannot_be_learned_is_refused(model, stats):
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        Recipe(**{**LEARNED, "iterations": 0})
    with pytest.raises(ValueError, match="needs one bias for all timesteps"):
        convert(model, Recipe(**{**LEARNED, "method": "htg", "num_groups": 2}), stats, quiet=True)

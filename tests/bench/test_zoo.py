"""The zoo of tiny models: a few of its entries each day, other ones tomorrow; `python -m ditq_bench.zoo` checks all."""

import dataclasses
import datetime
import importlib
import inspect

import diffusers
import pytest
import torch
from diffusers import ModelMixin

from ditq_bench.zoo import CLASSES, LEFT_OUT, PIPELINES, quiet, redraw
from ditq_bench.zoo.__main__ import main, pipe_row, row
from ditq_bench.zoo.check import pipe_problems, problems, sample
from ditq_bench.zoo.pipelines_edit import PIPELINES_EDIT

TODAY = datetime.date.today().toordinal()


def of_today(names, count):
    """`count` of the names, the next ones each day."""
    names = sorted(names)
    return [names[(TODAY * count + i) % len(names)] for i in range(count)]


@pytest.mark.parametrize("name", of_today(CLASSES, 6))
def test_an_entry_keeps_its_promises(name):
    """Finite results of a sound size, two blocks per list, widths of 64, equal bits from equal seeds."""
    line, found = row(CLASSES[name])
    assert found == []
    assert line.startswith(name)


def test_a_broken_promise_is_found():
    tiny = CLASSES["DiTTransformer2DModel"]
    config = {**tiny.config, "num_layers": 1, "attention_head_dim": 40}
    broken = dataclasses.replace(tiny, config=config, timestep="time")
    model = broken.build()
    torch.nn.init.zeros_(model.proj_out_1.bias)
    found = problems(broken, model, broken.inputs(model))
    assert "transformer_blocks: 1 block" in found
    assert "transformer_blocks.0.attn1.to_q: 80 channels go in" in found
    assert "time: no such argument" in found
    assert "proj_out_1.bias: all zeros or all ones" in found


def test_a_timestep_that_changes_nothing_is_found():
    """Flux's coordinates of text are zeros: their half is no other."""
    tiny = dataclasses.replace(CLASSES["FluxTransformer2DModel"], timestep="txt_ids")
    model = tiny.build()
    assert problems(tiny, model, tiny.inputs(model)) == ["txt_ids: another one changes nothing"]


def test_every_parameter_is_drawn_and_other_seeds_draw_others():
    tiny = CLASSES["DiTTransformer2DModel"]
    first, second = tiny.build(seed=1), tiny.build(seed=2)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all((a != b).any() for a, b in pairs)
    norm = redraw(torch.nn.LayerNorm(4096))
    assert ((norm.weight - 1).abs() >= 0.1).all()
    assert ((norm.weight - 1).abs() <= 0.4).all()
    assert (norm.bias.abs() >= 0.05).all()
    # 1024 draws of variance 1 / 16: their mean square lies within 5 of its standard deviations, sqrt(2 / 1024) / 16
    square = redraw(torch.nn.Linear(16, 64)).weight.square().mean().item()
    assert abs(square - 1 / 16) < 5 * (2 / 1024) ** 0.5 / 16


def test_building_leaves_the_random_state_of_the_caller_alone():
    before = torch.random.get_rng_state()
    tiny = CLASSES["DiTTransformer2DModel"]
    tiny.inputs(tiny.build())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(not diffusers.__version__.startswith("0.42"), reason="the zoo lists 0.42's")
def test_the_zoo_has_every_transformer_of_diffusers_or_says_why_not():
    home = "diffusers.models.transformers"
    listed = [
        name for name in vars(diffusers.models)["_import_structure"] if "transformers" in name
    ]
    found = set()
    for module in listed:
        for name, kind in vars(importlib.import_module(f"diffusers.models.{module}")).items():
            if (
                inspect.isclass(kind)
                and issubclass(kind, ModelMixin)
                and kind.__module__.startswith(home)
            ):
                found.add(name)
    assert len(found) > 70
    assert {name for name in found if hasattr(diffusers, name)} <= {*CLASSES, *LEFT_OUT}
    assert not CLASSES.keys() & LEFT_OUT.keys()
    assert len(CLASSES) >= 55


def test_the_command_refuses_an_unknown_name(capsys):
    assert main(["NoSuchClass"]) == 1
    assert "0 entries" in capsys.readouterr().out


@pytest.mark.parametrize("name", of_today(PIPELINES, 2))
def test_a_pipeline_keeps_its_promises(name):
    """Its calls run every transformer and give finite latents, each its own, and the same bits again."""
    line, found = pipe_row(name, PIPELINES[name])
    assert found == []
    assert line.startswith(name)


def test_a_pipeline_whose_transformer_idles_is_found():
    """With a boundary at the end of the steps Wan 2.2's second transformer has none."""
    pipe = PIPELINES["Wan22"]

    def make():
        made = pipe.make()
        made.register_to_config(boundary_ratio=0.1)
        return made

    same = (pipe.calls[0], pipe.calls[0])
    found = pipe_problems(dataclasses.replace(pipe, make=make, calls=same))
    assert found == ["transformer_2 did not run"] * 2 + ["both calls give the same"]


@pytest.mark.parametrize("name", of_today({n: p for n, p in PIPELINES.items() if p.saved}, 1))
def test_a_pipeline_is_saved_and_loaded(name, tmp_path):
    """Weights, tokenizers and settings all come back; sums may be ordered otherwise: memory is aligned otherwise."""
    pipe = PIPELINES[name]
    built = pipe.build()
    with quiet():
        built.save_pretrained(tmp_path)
        loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(built)
    for component in pipe.transformers:
        pairs = getattr(built, component).state_dict(), getattr(loaded, component).state_dict()
        torch.testing.assert_close(*pairs, rtol=0, atol=0)
    first, second = (sample(each, pipe.calls[0]) for each in (built, loaded))
    # two steps through some ten layers with fp32's 6e-8: far below the 1e-3 that another token or seed makes
    torch.testing.assert_close(second, first, rtol=0, atol=1e-4 * first.abs().max().item())


def test_classes_know_their_pipelines():
    """More than twenty classes, and a pipeline each for a given image, an edited one and a ControlNet."""
    piped = [tiny for tiny in CLASSES.values() if tiny.pipeline]
    assert len(piped) >= 20
    assert all(len(tiny.calls) == 2 for tiny in piped)
    kinds = {type(PIPELINES[name].build()).__name__ for name in PIPELINES_EDIT}
    assert kinds >= {"FluxImg2ImgPipeline", "FluxKontextPipeline", "FluxControlNetPipeline"}
    for name, pipe in (("FluxTransformer2DModel", "Flux"), ("WanTransformer3DModel", "Wan22")):
        assert type(CLASSES[name].pipeline().transformer).__name__ == name
        assert CLASSES[name].calls == PIPELINES[pipe].calls

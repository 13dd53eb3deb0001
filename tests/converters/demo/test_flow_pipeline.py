"""Opening, sampling and exporting the flow models."""

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

from ditq_converters import open_model
from ditq_converters.demo import export_demo, open_demo
from ditq_converters.demo.classifier import score
from ditq_converters.demo.drawing import call_arguments, draw_digits


@pytest.fixture(scope="module")
def pipe():
    return open_demo("demo:digits-flow")


def _draw(pipe, labels, steps, guidance=1.5):
    generator = torch.Generator().manual_seed(0)
    return draw_digits(pipe, torch.tensor(labels), steps, guidance, generator)


def _run(pipe, **call):
    call = {"num_inference_steps": 4, "output_type": "pt", "max_sequence_length": 8} | call
    return pipe(generator=torch.Generator().manual_seed(0), **call).images


def test_samples_are_the_digits_that_were_asked_for(pipe):
    labels = torch.arange(40) % 10
    images = _draw(pipe, labels.tolist(), steps=12)
    assert images.shape == (40, 1, 32, 32)
    assert score(images, labels).accuracy >= 0.95


def test_planted_copies_draw_the_same_images(pipe):
    natural = _draw(pipe, [1, 5, 8], steps=4)
    for planted in ("salient", "asymmetric"):
        images = _draw(open_demo(f"demo:digits-flow-{planted}"), [1, 5, 8], steps=4)
        # fp32 rounding, 1e-6 a step; a grey level is 8e-3
        assert 0 < (natural - images).abs().max() < 1e-4


def test_it_is_a_flux_that_is_not_told_its_guidance(pipe):
    assert isinstance(pipe, FluxPipeline)
    config = pipe.transformer.config
    assert not config.guidance_embeds
    assert sum(config.axes_dims_rope) == config.attention_head_dim
    assert torch.equal(_run(pipe, prompt="two", guidance_scale=9.0), _run(pipe, prompt="two"))


def test_true_guidance_moves_away_from_the_negative_prompt(pipe):
    arguments = call_arguments(pipe, [4, 4], 2.0)
    assert arguments["negative_prompt"] == ["", ""]
    guided = _run(pipe, **arguments)
    assert not torch.allclose(guided, _run(pipe, **arguments | {"true_cfg_scale": 1.0}), atol=0.01)
    against = _run(pipe, **arguments | {"negative_prompt": ["nine", "nine"]})
    assert not torch.allclose(guided, against, atol=0.01)


def test_embeddings_do_as_prompts(pipe):
    text, pooled, _ = pipe.encode_prompt("a seven", max_sequence_length=8)
    given = _run(pipe, prompt_embeds=text, pooled_prompt_embeds=pooled)
    assert torch.equal(given, _run(pipe, prompt="a seven"))


def test_a_prompt_alone_draws_its_digit(pipe):
    """With all of the pipeline's defaults: 512 text tokens, no guidance, the model's own size."""
    pipe.set_progress_bar_config(disable=True)
    call = {"max_sequence_length": 512, "num_inference_steps": 8}
    images = _run(pipe, prompt=["zero", "the digit one"], **call)
    assert score(images * 2 - 1, torch.tensor([0, 1])).accuracy == 1
    (image,) = pipe("three", num_inference_steps=1, max_sequence_length=8).images
    assert (image.mode, image.size) == ("L", (32, 32))


def test_stock_diffusers_loads_the_exported_folder(pipe, tmp_path):
    folder = export_demo("demo:digits-flow", tmp_path / "demo")
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert type(loaded) is FluxPipeline
    assert torch.equal(_draw(loaded, [2, 7], steps=2), _draw(pipe, [2, 7], steps=2))


def test_open_model_opens_it_in_another_dtype():
    pipe = open_model("demo:digits-flow", torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    images = _draw(pipe, [0, 6], steps=8)
    assert score(images, torch.tensor([0, 6])).accuracy == 1


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("ditq_converters.demo.flow.pipeline.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install transformers"):
        open_demo("demo:digits-flow-salient")

"""What `ditq sample` asks of a pipeline: defaults that are the pipeline's own, and a sentence for what it cannot do."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel

import ditq_runtime as ditq
from ditq_converters import Recipe, convert
from ditq_runtime.cli.last_inputs import LastInputs
from ditq_runtime.cli.wishes import Sizes, label_ids, wishes


class TextPipeline:
    """Draws its prompt's length and its seed, as pipelines of diffusers are called."""

    def __init__(self, sample_size=8):
        self.transformer = SimpleNamespace(config=SimpleNamespace(sample_size=sample_size))

    def __call__(self, prompt=None, num_inference_steps=20, height=None, width=None, generator=None,
                 use_resolution_binning=True):  # fmt: skip
        seeds = [g.initial_seed() for g in generator]
        return SimpleNamespace(images=list(zip(map(len, prompt), seeds, strict=True)))


class ImagePipeline(TextPipeline):
    def __call__(self, image, num_inference_steps=20):
        return None


class VideoPipeline(TextPipeline):
    def __call__(self, prompt, num_inference_steps=20, generator=None):
        return SimpleNamespace(frames=[])


def test_what_is_not_said_is_left_to_the_pipeline(tmp_path):
    (tmp_path / "p.txt").write_text("abc\n\nabcd\n", encoding="utf-8")
    told = wishes(TextPipeline(), "", ["a"], tmp_path / "p.txt", Sizes(), seed=5, batch=2)
    own = {"num_inference_steps": 20, "use_resolution_binning": False}
    assert [(one.arguments, one.seeds) for one in told] == [
        ({"prompt": ["a", "abc"], **own}, (5, 6)),
        ({"prompt": ["abcd"], **own}, (7,)),
    ]
    (told,) = wishes(TextPipeline(128), "", ["a"], None, Sizes(7, height=64))
    assert told.arguments == {"prompt": ["a"], "num_inference_steps": 7, "height": 64}


def test_what_a_folder_says_about_its_calls_is_taken_where_nothing_else_is_said():
    pipe = TextPipeline()
    pipe.ditq_call = {"prompt": ["one", "two"], "num_inference_steps": 9, "height": 32}
    common = {"use_resolution_binning": False, "height": 32}
    (told,) = wishes(pipe, "", [], None, Sizes())
    assert told.arguments == {"prompt": ["one", "two"], "num_inference_steps": 9, **common}
    (told,) = wishes(pipe, "", ["a"], None, Sizes(3, height=64))
    assert told.arguments == {**common, "prompt": ["a"], "num_inference_steps": 3, "height": 64}
    assert pipe.ditq_call["prompt"] == ["one", "two"]


@pytest.mark.parametrize(
    ("pipeline", "sizes", "sentence"),
    [
        (TextPipeline, Sizes(guidance=2.0), "--cfg: TextPipeline has no guidance_scale; leave it"),
        (VideoPipeline, Sizes(width=64), "--width: VideoPipeline has no width; leave it out"),
        (ImagePipeline, Sizes(), "ImagePipeline draws neither from classes nor from text; give"),
    ],
)
def test_what_a_pipeline_cannot_be_told(pipeline, sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        wishes(pipeline(), "", ["a fox"], None, sizes)


def test_a_family_without_a_table_is_reported_on_its_last_inputs():
    torch.manual_seed(0)
    model = AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, out_channels=4,
        pos_embed_max_size=64,
    ).eval()  # fmt: skip
    packed = convert(model, Recipe("linear"), quiet=True)
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 6, 32)
    with LastInputs(packed) as last, torch.no_grad():
        packed(latents * 0, text, timestep=torch.tensor([0.9, 0.1]))
        packed(latents, text, timestep=torch.tensor([0.5, 0.1]), return_dict=False)
    assert set(last.inputs) == {"hidden_states", "encoder_hidden_states", "timestep", "return_dict"}
    assert last.inputs["hidden_states"] is latents
    assert ditq.execution_report(packed, last.inputs).totals["integer_linears"] > 5
    assert not packed._forward_pre_hooks


def test_a_pipeline_that_names_all_its_classes_draws_no_others():
    pipe = TextPipeline()
    pipe.transformer.config.num_embeds_ada_norm = 1000  # more than it was trained on
    pipe.labels = {str(digit): digit for digit in range(10)}
    assert label_ids(pipe, "9,0") == [9, 0]
    with pytest.raises(ValueError, match="'77' is neither a class id below 10 nor one of 0, 1"):
        label_ids(pipe, "77")
    pipe.labels = {"three": 3, "seven": 7}  # names for some
    assert label_ids(pipe, "three, 999") == [3, 999]

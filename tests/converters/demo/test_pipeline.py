"""Opening, sampling and exporting the demo models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline

import ditq_converters.pipeline_folder as pipeline_folder
from ditq_converters import demo
from ditq_converters.demo import DEMO_MODELS, export_demo, open_demo
from ditq_converters.demo.classifier import score
from ditq_converters.demo.drawing import draw_digits

DITS = [name for name in DEMO_MODELS if "flow" not in name]


def _draw(pipe, labels, steps):
    generator = torch.Generator().manual_seed(0)
    return draw_digits(pipe, torch.tensor(labels), steps, 1.5, generator)


@pytest.mark.parametrize("name", DITS)
def test_samples_are_the_digits_that_were_asked_for(name):
    labels = torch.arange(40) % 10
    images = _draw(open_demo(name), labels.tolist(), steps=20)
    assert images.shape == (40, 1, 32, 32)
    assert score(images, labels).accuracy >= 0.9


def test_all_models_draw_the_same_images():
    natural, *planted = (_draw(open_demo(name), [1, 5, 8], steps=10) for name in DITS)
    assert len(planted) == 2
    for images in planted:
        # fp32 rounding, 1e-6 a step, through 10 steps; a grey level is 8e-3
        assert 0 < (natural - images).abs().max() < 1e-4


def test_an_image_is_a_32_pixel_greyscale_picture():
    pipe = open_demo("demo:digits")
    pipe.set_progress_bar_config(disable=True)
    (image,) = pipe(class_labels=pipe.get_label_ids(["seven"]), num_inference_steps=2).images
    assert (image.mode, image.size) == ("L", (32, 32))


@pytest.mark.parametrize("name", DITS)
def test_stock_diffusers_loads_the_exported_folder(name, tmp_path):
    folder = export_demo(name, tmp_path / "deep" / "demo")
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]  # no temporary is left
    assert json.loads((folder / "model_index.json").read_text())["id2label"]["3"] == "three"

    loaded, opened = DiTPipeline.from_pretrained(folder), open_demo(name)
    assert loaded.labels == opened.labels
    assert loaded.get_label_ids(["zero", "nine"]) == [0, 9]
    assert torch.equal(_draw(loaded, [2, 7], steps=4), _draw(opened, [2, 7], steps=4))


def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="already exists"):
        export_demo("demo:digits", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(pipeline_folder, "_keep_labels", fail)
    with pytest.raises(OSError, match="disk full"):
        export_demo("demo:digits", tmp_path / "demo")
    assert not [*tmp_path.iterdir()]


def test_the_models_are_these():
    assert DEMO_MODELS == (
        "demo:digits",
        "demo:digits-salient",
        "demo:digits-asymmetric",
        "demo:digits-flow",
        "demo:digits-flow-salient",
        "demo:digits-flow-asymmetric",
    )


@pytest.mark.parametrize("name", ["demo:letters", "digits", ""])
def test_unknown_names_are_refused_with_the_known_ones(name, tmp_path):
    with pytest.raises(ValueError, match=rf"choose one of: {', '.join(DEMO_MODELS)}$"):
        open_demo(name)
    with pytest.raises(ValueError, match="unknown demo model"):
        export_demo(name, tmp_path / "demo")
    assert not [*tmp_path.iterdir()]


def test_importing_the_package_is_cheap():
    # a bare parent: what ditq_converters itself imports is not the matter here
    folder = str(Path(demo.__file__).parents[1])
    code = (
        "import sys, types; parent = sys.modules['ditq_converters'] = types.ModuleType('parent');"
        f"parent.__path__ = [{folder!r}]; import ditq_converters.demo;"
        "assert not {'torch', 'diffusers', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

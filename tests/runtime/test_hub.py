"""Publishing a packed folder: against a stand-in of the hub, downloaded again, and a card that tells the truth."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image

import ditq_runtime as ditq
from ditq_runtime.host.hub import model_card


class Hub:
    """Keeps what is uploaded, in a folder."""

    def __init__(self, root):
        self.root, self.created = root, []

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.created.append((repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / repo_id)
        return f"https://hub.test/{repo_id}"


@pytest.fixture
def hub(tmp_path):
    return Hub(tmp_path / "hub")


def test_what_is_uploaded_loads_again(packed_folder, load, forward, hub, tmp_path):
    folder = packed_folder("w4p_static")
    report = {"sqnr": {"free_db": [30.0, 40.0]}, "bytes": {"packed": 12345}, "layers": [{"a": 1}]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    place = ditq.push_to_hub(
        folder, "me/packed", tmp_path / "report.json", tmp_path / "grid.png", True, api=hub
    )
    assert place == "https://hub.test/me/packed"
    assert hub.created == [("me/packed", True, True)]
    uploaded = hub.root / "me" / "packed"
    assert torch.equal(forward(load(uploaded)), forward(load(folder)))
    assert (uploaded / "samples.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    card = (uploaded / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    for line in (
        "![samples](samples.png)",
        "| method | smoothquant |",
        "| weights | w4p |",
        "| sqnr.free_db, mean of 2 | 35 |",
        "| bytes.packed | 12345 |",
        "from diffusers import DiffusionPipeline",
    ):
        assert line in card
    assert "w4p weights, int8 activations with calibrated ranges" in card
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_sizes_on_the_card_add_up_to_the_files(packed_folder):
    folder = packed_folder("w8_static") / "transformer"
    card = model_card(folder)
    sizes = dict(re.findall(r"^\| ([a-z ]+) \| ([\d,]+) \|$", card, re.MULTILINE))
    sizes = {part: int(size.replace(",", "")) for part, size in sizes.items()}
    whole = sizes.pop("all weight files")
    assert whole == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert sum(sizes.values()) == whole
    assert "Nothing was measured of this upload" in card
    assert "from diffusers import DiTTransformer2DModel" in card
    assert "samples.png" not in card


def test_nothing_is_uploaded_of_what_cannot_be(build_model, packed_folder, hub, tmp_path):
    build_model().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="is a float model"):
        ditq.push_to_hub(tmp_path / "float", "me/float", api=hub)
    with pytest.raises(ditq.CheckpointError, match="expected a diffusers pipeline"):
        ditq.push_to_hub(tmp_path / "nowhere", "me/none", api=hub)
    with pytest.raises(ValueError, match=r"missing\.json is not a file"):
        ditq.push_to_hub(packed_folder("w8_static"), "me/x", tmp_path / "missing.json", api=hub)
    assert hub.created == []


def test_a_card_in_the_folder_does_not_disturb_loading(packed_folder, hub, forward, load):
    folder = packed_folder("w8_static") / "transformer"
    ditq.push_to_hub(folder, "me/alone", api=hub)
    model = DiTTransformer2DModel.from_pretrained(hub.root / "me" / "alone")
    assert torch.equal(forward(model), forward(load(packed_folder("w8_static"))))

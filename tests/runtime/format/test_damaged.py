"""Damaged configs: each is one sentence of ours, from `from_pretrained`, from `inspect` and from the reader alone."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from diffusers import AutoModel, DiTTransformer2DModel, configuration_utils
from diffusers.utils import hub_utils
from huggingface_hub.errors import EntryNotFoundError

import ditq_runtime as ditq
from ditq_runtime.format.digests import CONFIG, SWITCH, config_digest
from ditq_runtime.format.folder import open_folder
from ditq_runtime.host.loadable import check_loadable

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "version1" / "dit_token"
FILE = "diffusion_pytorch_model.safetensors"
BLOCK = "transformer_blocks.1"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of version 2: w8 and w4p, a low-rank branch, a fold."""
    out = tmp_path_factory.mktemp("damaged") / "saved"
    DiTTransformer2DModel.from_pretrained(FIXTURE / "transformer").save_pretrained(out)
    return out


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def sign(config):
    """Give a config that was changed its digest again, as one does who means it."""
    digests = config.get("quantization_config")
    digests = digests.get("digests") if isinstance(digests, dict) else None
    if isinstance(digests, dict) and CONFIG in digests:
        digests[CONFIG] = config_digest(config)


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    sign(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_undamaged_one_loads(saved):
    check_loadable(open_folder(saved))
    DiTTransformer2DModel.from_pretrained(saved)


def scheme(change):
    return lambda c: change(c["quantization_config"]["scheme"])


def formats(**changes):
    return scheme(lambda s: [entry.update(changes) for entry in s["formats"].values()])


def site(**changes):
    return scheme(lambda s: s["sites"][f"{BLOCK}.qkv"].update(changes))


DAMAGES = [
    (lambda c: c["quantization_config"].update(scheme=[]), "scheme: expected an object, got list"),
    (lambda c: c["quantization_config"].update(scheme="w8"), "scheme: expected an object, got str"),
    (lambda c: c["quantization_config"].update(recipe=[1]), "recipe must be of type dict"),
    (lambda c: c["quantization_config"].update(digests=3), "digests must be of type dict"),
    (
        lambda c: c["quantization_config"].update(digestz=c["quantization_config"].pop("digests")),
        r"unknown keys \['digestz'\]",
    ),
    (lambda c: c["quantization_config"].update(format_version=2.0), "format_version 2.0 is not"),
    (formats(groups=-1), "groups must be a count of at least 1"),
    (formats(groups=10**40), "groups must be a count"),
    (formats(lora_rank=2**40), "lora_rank must be a count"),
    (formats(lora_rank="2"), "lora_rank must be of type int"),
    (formats(bias=0), "bias must be of type bool"),
    (site(shifts=-1), "shifts must be a count"),
    (site(shifts=10**9), "shifts must be a count"),
    (site(smooth=None), "smooth must be of type bool"),
    (site(readers={}), "readers must be of type list"),
    (site(place="adaln", producers={f"{BLOCK}.nowhere": [0]}), "which the model lacks"),
    (scheme(lambda s: s["sites"].update({"blocks.9.qkv": s["sites"].pop(f"{BLOCK}.qkv")})), "qkv"),
    (scheme(lambda s: s.update(timestep_freq="dot")), "timestep_freq must be one of"),
    (scheme(lambda s: s.update(timestep=[])), "timestep must be of type str"),
    (scheme(lambda s: s["layers"].update({"": "w8_weight_only"})), "no linear of that name"),
    (
        scheme(lambda s: s.update(attention={"": {"values": "int8", "scales": "token"}})),
        "attention",
    ),
    (scheme(lambda s: s.update(attention={f"{BLOCK}.attn1": []})), "expected an object, got list"),
    (scheme(lambda s: s.update(architecture="UNet2DModel")), "written for 'UNet2DModel'"),
]


@pytest.mark.parametrize(("change", "sentence"), DAMAGES)
def test_each_is_one_sentence(copy, change, sentence):
    edit(copy, change)
    with pytest.raises((ditq.CheckpointError, ValueError), match=sentence) as caught:
        check_loadable(open_folder(copy))
    assert "\n" not in str(caught.value)
    with pytest.raises(ditq.CheckpointError, match=sentence):
        DiTTransformer2DModel.from_pretrained(copy)


@pytest.mark.parametrize("value", ["", "ditq", [], 3, True])
@pytest.mark.parametrize("opened", [open_folder, DiTTransformer2DModel.from_pretrained])
def test_a_quantization_that_is_no_object_is_refused(copy, value, opened):
    edit(copy, lambda c: c.update(quantization_config=value))
    with pytest.raises(ditq.CheckpointError, match="quantization_config must be a JSON object"):
        opened(copy)


@pytest.mark.parametrize("opened", [open_folder, DiTTransformer2DModel.from_pretrained])
def test_a_quantization_that_lost_its_name_or_method_is_refused(copy, opened):
    edit(copy, lambda c: c.update(quantization_confi=c.pop("quantization_config")))
    with pytest.raises(ditq.CheckpointError, match="has another name"):
        opened(copy)
    edit(copy, lambda c: c.update(quantization_config={"": 0}, quantization_confi=None))
    with pytest.raises(ditq.CheckpointError, match="quant_method is missing"):
        opened(copy)


@pytest.mark.parametrize("method", [None, "", 5, ["ditq"], "DITQ"])
def test_a_method_of_another_name_is_refused(copy, method):
    edit(copy, lambda c: c["quantization_config"].update(quant_method=method))
    sentence = re.escape(f"quant_method must be 'ditq', got {method!r}")
    for read in (open_folder, DiTTransformer2DModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ditq.CheckpointError, match=sentence):
            read(str(copy))
    edit(copy, lambda c: c.update(quantization_config={"quant_method": method}))
    if not isinstance(method, str):  # of another method otherwise, which diffusers knows or not
        with pytest.raises(ditq.CheckpointError, match="quant_method must be a string"):
            DiTTransformer2DModel.from_pretrained(copy)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Nope", "", None, 5])
def test_a_class_of_another_name_is_refused(copy, name):
    edit(copy, lambda c: c.update(_class_name=name))
    sentence = f"_class_name is {name!r}, but its scheme was written for 'DiTTransformer2DModel'"
    for read in (open_folder, DiTTransformer2DModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ditq.CheckpointError, match=sentence):
            read(str(copy))


def without_quantization(folder):
    edit(folder, lambda c: c.pop("quantization_config"))


def of_many_layers(folder):
    def change(config):
        config.update(num_layers=100_000)
        config["quantization_config"].pop("digests")

    edit(folder, change)


def cut_off(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-8])


def flipped(folder):
    raw = bytearray((folder / FILE).read_bytes())
    raw[-9] ^= 4
    (folder / FILE).write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (without_quantization, "quantization_config is missing, though"),
        (of_many_layers, "num_layers is '100000', but the files beside it hold"),
        (cut_off, "bytes on disk"),
        (flipped, "is damaged: its digest"),
    ],
)
def test_a_first_load_from_a_hub_is_looked_at_when_its_weights_are_there(
    copy, damage, sentence, tmp_path, monkeypatch
):
    def download(name, filename, **_):
        """config.json comes first, and nothing is beside it."""
        if not (copy / filename).exists():
            raise EntryNotFoundError(filename)
        (tmp_path / "cache").mkdir(exist_ok=True)
        return shutil.copy(copy / filename, tmp_path / "cache" / filename)

    for module in (configuration_utils, hub_utils):
        monkeypatch.setattr(module, "hf_hub_download", download)
    DiTTransformer2DModel.from_pretrained("someone/name")
    shutil.rmtree(tmp_path / "cache")
    damage(copy)
    with pytest.raises(ditq.CheckpointError, match=sentence):
        DiTTransformer2DModel.from_pretrained("someone/name")


def test_json_of_any_depth_is_refused(copy):
    (copy / "config.json").write_text("[" * 100_000)
    with pytest.raises(ditq.CheckpointError, match=r"config\.json: not valid JSON"):
        open_folder(copy)
    with pytest.raises(ditq.CheckpointError, match=r"config\.json: nested without end"):
        DiTTransformer2DModel.from_pretrained(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(norm_eps=1e-4),  # would load, and compute something else
        lambda c: c.update(num_layers=50),  # would be built first; of 10**9, until memory ends
        lambda c: c["quantization_config"]["scheme"].update(timestep="class_labels"),
    ],
)  # fmt: skip
def test_a_config_that_could_be_meant_differs_from_its_digest(copy, change, monkeypatch):
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ditq.CheckpointError, match=r"config\.json: is damaged, or was changed by"):
        DiTTransformer2DModel.from_pretrained(copy)
    if config["num_layers"] > 10:
        return
    monkeypatch.setenv(SWITCH, "0")
    DiTTransformer2DModel.from_pretrained(copy)


@pytest.mark.parametrize("layers", [10**9, "1"])
def test_layers_that_no_file_holds_are_refused_without_a_digest_too(copy, layers):
    config = json.loads((copy / "config.json").read_text())
    config["num_layers"] = layers
    config["quantization_config"].pop("digests")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ditq.CheckpointError, match=rf"num_layers is '{layers}', but the files"):
        DiTTransformer2DModel.from_pretrained(copy)


def test_notes_of_other_programs_in_a_config_change_nothing(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"_name_or_path": "elsewhere", "_diffusers_version": "9.9"}
    (copy / "config.json").write_text(json.dumps(config, indent=7))
    check_loadable(open_folder(copy))
    DiTTransformer2DModel.from_pretrained(copy)


@pytest.mark.parametrize("metadata", [None, 3, []])
def test_an_index_without_metadata_is_refused(copy, metadata):
    index = {"weight_map": {"a": FILE}, "metadata": metadata}
    (copy / f"{FILE}.index.json").write_text(json.dumps(index))
    for opened in (open_folder, DiTTransformer2DModel.from_pretrained):
        with pytest.raises(ditq.CheckpointError, match="metadata must be of type dict"):
            opened(copy)


@pytest.mark.parametrize("shards", [{"a": 3}, {"a": None}, {"a": {"b": "c"}}, [], "x"])
def test_names_of_shards_that_are_no_text_are_refused(copy, shards):
    index = copy / f"{FILE}.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ditq.CheckpointError, match=r"index\.json: weight_map.* must be of type"):
        open_folder(copy)


@pytest.mark.parametrize("name", [FILE, "config.json"])
def test_a_pipe_in_place_of_a_file_does_not_hang(copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(ditq.CheckpointError, match=f"{name}: is no file"):
        open_folder(copy)


def test_a_model_config_that_no_model_can_be_made_from_is_refused(copy):
    edit(copy, lambda c: c.update(num_attention_heads="many"))
    with pytest.raises(ditq.CheckpointError, match="DiTTransformer2DModel cannot be made from it"):
        check_loadable(open_folder(copy))


def test_inspect_names_what_would_not_load(copy):
    from ditq_converters.cli.inspect import inspect_packed

    inspect_packed(str(copy), verify=True)
    edit(copy, scheme(lambda s: s["layers"].pop("proj_out_1")))
    with pytest.raises(ditq.CheckpointError, match=r"proj_out_1\..*: unknown tensor"):
        inspect_packed(str(copy))

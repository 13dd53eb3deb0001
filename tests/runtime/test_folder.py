"""Sizes by category, from hand-worked numbers, and folders that are refused."""

import json
import shutil

import pytest
from diffusers import DiTTransformer2DModel

from ditq_converters.models.open import open_model
from ditq_runtime import CheckpointError, QuantLinear
from ditq_runtime.format.folder import open_folder
from ditq_runtime.host.sizes import CATEGORIES, float_weights, size_by_category

D, BLOCKS = 64, 2
LINEARS = 4 * D * D + 2 * 4 * D * D  # weights of q, k, v, o, fc1, fc2 of a block
MODULATION = 6 * D * D
OUTPUTS = 4 * D + 4 * D + D  # outputs of the same linears: 4 of D, fc1 4 D, fc2 D
# embedder: 256 -> D -> D for the timestep, a table of 1001 labels, all fp32
EMBEDDER = 4 * ((256 * D + D) + (D * D + D) + 1001 * D)
FINAL = (
    2 * D * D
)  # final modulation D -> 2 D, in w8 everywhere; a scale and a bias for each of its outputs
# patch embedding 2x2 of one channel, final projection D -> 4
OTHER = 4 * ((4 * D + D) + (4 * D + 4))
BIASES = 4 * (OUTPUTS + 6 * D)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "w8_static",  # an embedder in each block
            {
                "block weights": BLOCKS * LINEARS,
                "modulation weights": BLOCKS * MODULATION + FINAL,
                "group scales and offsets": 0,
                # weight_scale and weight_sum of six linears, act_scale and act_zero of four sites, smooth_inv of fc2
                "channel and activation scales": 4
                * (BLOCKS * (2 * OUTPUTS + 6 * D + 4 * 2 + 4 * D) + 2 * D),
                "biases": BLOCKS * BIASES + 4 * 2 * D,
                "low-rank branches": 0,
                "folds": BLOCKS * 3 * 4 * D,
                "timestep and label embedder": BLOCKS * EMBEDDER,
                "other float": OTHER,
            },
        ),
        (
            "w4p_static",  # one embedder for both blocks, groups of 32
            {
                "block weights": BLOCKS * LINEARS // 2,
                "modulation weights": BLOCKS * MODULATION // 2 + FINAL,
                "group scales and offsets": BLOCKS * 2 * (LINEARS + MODULATION) // 32,
                "channel and activation scales": 4
                * (BLOCKS * (2 * OUTPUTS + 6 * D + 4 * 2 + 4 * D) + 2 * D),
                "biases": BLOCKS * BIASES + 4 * 2 * D,
                "low-rank branches": 0,
                "folds": BLOCKS * 3 * 4 * D,
                "timestep and label embedder": EMBEDDER,
                "other float": OTHER,
            },
        ),
    ],
)
def test_bytes_by_category_are_the_hand_worked_ones(packed_folder, name, expected):
    folder = open_folder(packed_folder(name))
    sizes = size_by_category(folder)
    assert list(sizes) == list(CATEGORIES)
    headers = sizes.pop("file headers")
    assert sizes == expected
    file = packed_folder(name) / "transformer" / "diffusion_pytorch_model.safetensors"
    assert headers == 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize("name", ["w8_static", "w8_token", "w4p_static", "w4p_token", "kept"])
def test_sizes_add_up_to_the_bytes_on_disk(packed_folder, name):
    folder = open_folder(packed_folder(name) / "transformer")
    on_disk = sum(path.stat().st_size for path in folder.path.glob("*.safetensors"))
    assert sum(size_by_category(folder).values()) == folder.nbytes == on_disk


def test_sizes_of_a_sharded_and_of_a_float_folder_add_up(packed_folder, load, pipes, tmp_path):
    load(packed_folder("w8_static")).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    pipes["own"].transformer.save_pretrained(tmp_path / "float")
    for name in ("shards", "float"):
        folder = open_folder(tmp_path / name)
        assert sum(size_by_category(folder).values()) == folder.nbytes
    assert len(open_folder(tmp_path / "shards").files) > 3
    assert open_folder(tmp_path / "float").scheme is None


@pytest.mark.parametrize("name", ["w8_static", "w4p_token", "kept"])
def test_the_weights_that_stay_float_are_counted(packed_folder, load, pipes, name):
    folder = open_folder(packed_folder(name))
    share, names = float_weights(folder)
    model = load(packed_folder(name))
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    integers = sum(
        m.in_features * m.out_features for m in packed.values() if m.format.weights != "fp32"
    )
    floats = {
        key.removesuffix(".weight"): tensor.numel()
        for key, tensor in model.state_dict().items()
        if tensor.dim() > 1 and tensor.is_floating_point() and ".ditq_sites." not in key
        and key.rpartition(".")[0] not in {n for n, m in packed.items() if m.format.weights != "fp32"}
        and key in folder.headers
    }  # fmt: skip
    assert set(names) == set(floats)
    assert [floats[n] for n in names] == sorted(floats.values(), reverse=True)
    assert share == sum(floats.values()) / (sum(floats.values()) + integers)
    assert ("transformer_blocks.0.attn1.to_q" in names) == (name == "kept")


def test_a_pipeline_folder_is_opened_at_its_transformer(packed_folder):
    folder = open_folder(packed_folder("w8_static"))
    assert folder.path == packed_folder("w8_static") / "transformer"
    assert folder.scheme is not None
    assert folder.scheme.architecture == "DiTTransformer2DModel"
    assert folder.scheme.sites["transformer_blocks.0.fc2"].quantizer_smooths
    assert folder.quantization["recipe"]["method"] == "smoothquant"
    again = open_folder(str(packed_folder("w8_static") / "transformer"))
    assert again == folder


@pytest.fixture
def copy(packed_folder, tmp_path):
    """A transformer folder to be damaged."""
    return shutil.copytree(packed_folder("w8_static") / "transformer", tmp_path / "copy")


def test_missing_parts_are_refused_by_name(copy, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no config\.json there; expected a diff"):
        open_folder(tmp_path / "nowhere")
    (copy / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no diffusion_pytorch_model\*\.safetensors there"):
        open_folder(copy)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[]", "null", "3", b"\xff\xfe"])
def test_configs_that_are_no_json_object_are_refused_by_name(copy, text):
    config = copy / "config.json"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _ = open_folder(copy).scheme


def _edit(copy, change):
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("name", ["w8_static", "w8_token", "w4p_token", "w4g_static"])
def test_codes_beside_a_config_without_quantization_are_refused(packed_folder, tmp_path, name):
    """diffusers would read the codes of 8 bits as weights, and only warn."""
    folder = shutil.copytree(packed_folder(name) / "transformer", tmp_path / "copy")
    _edit(folder, lambda c: c.pop("quantization_config"))
    for opened in (
        open_folder,
        DiTTransformer2DModel.from_pretrained,
        lambda f: open_model(str(f)),
    ):
        with pytest.raises(
            CheckpointError, match=r"quantization_config is missing, though .*codes"
        ):
            opened(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(quantization_config={"quant_method": "gptq"}), "quantized with 'gptq'"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "must be 'ditq', got"),
        (lambda c: c["quantization_config"].update(format_version=9), "format_version 9 is not"),
        (lambda c: c["quantization_config"].pop("scheme"), "scheme: expected an object"),
        (lambda c: c.update(quantization_config="ditq"), "quantization_config"),
    ],
)
def test_quantizations_that_are_not_ours_are_refused(copy, change, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        _ = open_folder(_edit(copy, change)).scheme


def of_a_unet(config):
    config["_class_name"] = "UNet2DModel"
    config["quantization_config"]["scheme"]["architecture"] = "UNet2DModel"


@pytest.mark.parametrize("change", [lambda c: c.pop("_class_name"), of_a_unet])
def test_sizes_of_an_unknown_architecture_are_refused_with_a_sentence(copy, change):
    folder = open_folder(_edit(copy, change))
    with pytest.raises(ValueError, match=r"DiTTransformer2DModel|_class_name"):
        size_by_category(folder)


def test_a_cut_off_file_is_refused_by_name(copy):
    file = copy / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors: \d+ bytes"):
        open_folder(copy)


def test_a_missing_shard_is_refused_by_name(packed_folder, load, tmp_path):
    load(packed_folder("w8_static")).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    gone = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        open_folder(tmp_path / "shards")

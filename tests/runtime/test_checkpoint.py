"""A damaged or incomplete checkpoint is refused by from_pretrained, and the message names what is wrong."""

import json
import shutil
import struct

import pytest
import torch
from diffusers import DiTTransformer2DModel

from ditq_runtime import FORMAT_VERSION, CheckpointError
from ditq_runtime.format.checkpoint import check_version, read_headers

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
TWINS = {"F32": "I32", "I32": "F32", "I8": "U8", "U8": "I8"}  # other dtypes of the same size
Q, FC2 = "transformer_blocks.1.attn1.to_q", "transformer_blocks.0.ff.net.2"
MODULATION = "transformer_blocks.0.norm1.linear"
SITE, FC2_SITE = "transformer_blocks.1.ditq_sites.qkv", "transformer_blocks.0.ditq_sites.fc2"


@pytest.fixture
def copy(packed_folder, tmp_path):
    """Recipe name -> a copy of its transformer folder, to be damaged; without digests, which would see it first."""

    def make(name):
        folder = shutil.copytree(packed_folder(name) / "transformer", tmp_path / name)
        _edit_config(folder, lambda config: config.pop("digests"))
        return folder

    return make


def _why_refused(folder, **options):
    """The message with which loading fails; fails the test if it does not."""
    with pytest.raises((ValueError, OSError)) as caught:  # CheckpointError is a ValueError
        DiTTransformer2DModel.from_pretrained(folder, **options)
    return str(caught.value)


def _truncated(path, offsets):
    """Offsets at which the cut-off file was not refused with its name."""
    whole, bad = path.read_bytes(), []
    for offset in offsets:
        path.write_bytes(whole[:offset])
        try:
            DiTTransformer2DModel.from_pretrained(path.parent)
            bad.append((offset, "loaded"))
        except (ValueError, OSError) as error:
            if path.name not in str(error):
                bad.append((offset, str(error)))
    path.write_bytes(whole)
    return bad


@pytest.mark.parametrize("name", ["w8_static", "w4p_static"])
def test_truncated_at_any_of_200_offsets_it_is_refused(copy, take_apart, name):
    weights = take_apart(copy(name) / WEIGHTS_FILE)
    size, begin = len(weights.raw), weights.data_begin
    in_header = [0, 1, 7, 8, 9, begin - 1, begin, *range(10, begin - 1, (begin - 11) // 52)][:60]
    in_data = [begin + 1 + i * (size - begin - 2) // 139 for i in range(140)]
    offsets = sorted({*in_header, *in_data})
    assert (len(offsets), offsets[-1]) == (200, size - 1)
    assert not _truncated(weights.path, offsets)
    DiTTransformer2DModel.from_pretrained(weights.path.parent)  # whole again, it loads


def _damages(name, entry):
    """Damage kind -> (changed entries, the names one of which the message must hold)."""
    dtype, shape, data = entry
    yield "missing", {name: None}, (name,)
    yield "renamed", {name: None, f"{name}_": entry}, (name,)
    yield "a dimension more", {name: [dtype, [*shape, 1], data]}, (name,)
    row = data[: len(data) // shape[0]]
    yield "longer", {name: [dtype, [shape[0] + 1, *shape[1:]], data + row]}, (name,)
    if len(shape) == 2 and shape[0] != shape[1]:
        yield "transposed", {name: [dtype, shape[::-1], data]}, (name,)
    yield "retyped", {name: [TWINS[dtype], shape, data]}, (name,)
    for value in (float("nan"), float("inf"), float("-inf")) if dtype == "F32" else ():
        middle = len(data) // 8 * 4
        spoiled = data[:middle] + struct.pack("<f", value) + data[middle + 4 :]
        yield str(value), {name: [dtype, shape, spoiled]}, (name,)


@pytest.mark.parametrize(
    ("name", "part", "at_least"),
    [("w8_static", "", 80), ("w4p_static", "1.ff.", 12), ("w4g_static", "1.attn1.", 20)],
)
def test_with_any_one_tensor_damaged_it_is_refused_by_name(copy, take_apart, name, part, at_least):
    """All tensors of one recipe; of the others a part that holds every field which that one lacks."""
    weights = take_apart(copy(name) / WEIGHTS_FILE)
    tensors = [tensor for tensor in weights.entries if part in tensor]
    assert len(tensors) >= at_least
    bad = []
    for tensor in tensors:
        entry = weights.entries[tensor]
        for kind, changes, names in _damages(tensor, entry):
            weights.write(changes)
            try:
                DiTTransformer2DModel.from_pretrained(weights.path.parent)
                bad.append((kind, tensor, "loaded"))
            except CheckpointError as error:
                if not any(part in str(error) for part in names):
                    bad.append((kind, tensor, str(error)))
    assert not bad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "tensor",
    [f"{FC2}.weight_scale", f"{FC2}.bias", f"{FC2_SITE}.act_scale", f"{FC2_SITE}.smooth_inv"],
)
def test_a_packed_layer_in_another_float_dtype_is_refused(copy, take_apart, tensor, dtype):
    weights = take_apart(copy("w8_static") / WEIGHTS_FILE)
    _, shape, data = weights.entries[tensor]
    cast = torch.frombuffer(bytearray(data), dtype=torch.float32).to(dtype)
    label = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}[dtype]
    weights.write({tensor: [label, shape, cast.view(torch.uint8).numpy().tobytes()]})
    message = _why_refused(weights.path.parent)
    assert message.startswith(f"{tensor}: dtype {dtype} in the checkpoint, torch.float32")


def _put(data, index, code, value):
    """Bytes with the element at `index` replaced."""
    size = struct.calcsize(code)
    return data[: index * size] + struct.pack(f"<{code}", value) + data[(index + 1) * size :]


@pytest.mark.parametrize(
    ("name", "tensor", "code", "value", "sentence"),
    [
        ("w8_static", f"{Q}.weight_scale", "f", 0.0, "every scale must be positive"),
        ("w8_static", f"{Q}.weight_scale", "f", -1e-3, "every scale must be positive"),
        ("w8_static", f"{MODULATION}.weight_scale", "f", 0.0, "every scale must be positive"),
        ("w8_static", f"{SITE}.act_scale", "f", 0.0, "every scale must be positive"),
        ("w8_static", f"{FC2_SITE}.smooth_inv", "f", -0.5, "every scale must be positive"),
        ("w8_static", f"{SITE}.act_zero", "i", 128, "128 is outside"),
        ("w8_static", f"{SITE}.act_zero", "i", -129, "-129 is outside"),
        ("w8_static", f"{Q}.weight", "b", -128, "outside [-127, 127]"),
        ("w8_static", f"{MODULATION}.weight", "b", -128, "outside [-127, 127]"),
        ("w8_static", f"{Q}.weight_sum", "i", 12345, "not the row sums"),
        ("w4p_static", f"{Q}.weight_sum", "i", 12345, "not the row sums"),
        ("w4p_static", f"{Q}.group_scale", "B", 0, "scale 0"),
        ("w4p_token", f"{Q}.group_scale", "B", 0, "scale 0"),
        ("w4p_static", f"{Q}.group_scale", "B", 255, "outside [-127, 127]"),
        ("w4p_token", f"{Q}.group_offset", "b", 127, "outside [-127, 127]"),
        ("w4p_token", f"{Q}.group_offset", "b", -128, "outside [-127, 127]"),
        ("w4p_static", f"{MODULATION}.group_scale", "B", 255, "outside [-127, 127]"),
        ("w4g_static", f"{Q}.weight_scale", "f", 0.0, "every scale must be positive"),
        ("w4g_static", f"{Q}.weight_zero", "B", 16, "outside 0..15"),
        ("w4g_static", f"{MODULATION}.weight_zero", "B", 255, "outside 0..15"),
        ("w4g_static", f"{Q}.weight_sum", "i", 12345, "not the row sums"),
    ],
)
def test_values_that_no_converter_writes_are_refused(
    copy, take_apart, name, tensor, code, value, sentence
):
    weights = take_apart(copy(name) / WEIGHTS_FILE)
    dtype, shape, data = weights.entries[tensor]
    last = len(data) // struct.calcsize(code) - 1
    if value == -128 and tensor.endswith("group_offset"):  # its group must hold a code 0
        codes = weights.entries[f"{Q}.weight"][2]
        weights.entries[f"{Q}.weight"][2] = codes[:-1] + b"\0"
    weights.write({tensor: [dtype, shape, _put(data, last, code, value)]})
    message = _why_refused(weights.path.parent)
    assert sentence in message
    assert tensor.rpartition(".")[0] in message


@pytest.mark.parametrize("name", ["w8_static", "w4p_static", "w4g_static"])
def test_one_changed_code_of_a_static_layer_is_seen_in_its_weight_sum(copy, take_apart, name):
    weights = take_apart(copy(name) / WEIGHTS_FILE)
    dtype, shape, data = weights.entries[f"{Q}.weight"]
    weights.write({f"{Q}.weight": [dtype, shape, bytes([data[0] ^ 1]) + data[1:]]})
    assert f"{Q}.weight_sum: not the row sums" in _why_refused(weights.path.parent)


@pytest.mark.parametrize("kind", ["one place for two", "a hole", "nesting"])
def test_a_header_that_cannot_be_is_refused_with_the_name_of_the_file(copy, take_apart, kind):
    weights = take_apart(copy("w8_static") / WEIGHTS_FILE)
    header = json.loads(weights.raw[8 : weights.data_begin])
    data = weights.raw[weights.data_begin :]
    if kind == "one place for two":
        header[f"{Q}.bias"]["data_offsets"] = header[f"{Q}.weight_scale"]["data_offsets"]
    if kind == "a hole":
        last = max(header.values(), key=lambda entry: entry.get("data_offsets", [0, 0])[1])
        last["data_offsets"] = [offset + 64 for offset in last["data_offsets"]]
        data += b"\0" * 64
    text = b"[" * 100_000 if kind == "nesting" else json.dumps(header).encode()
    weights.path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert WEIGHTS_FILE in _why_refused(weights.path.parent)


def test_a_tensor_too_many_is_refused(copy, take_apart):
    weights = take_apart(copy("w8_token") / WEIGHTS_FILE)
    weights.write({"proj_out_3.weight": ["F32", [1], b"\0" * 4]})
    assert "proj_out_3.weight: unknown tensor" in _why_refused(weights.path.parent)


def test_a_copy_of_a_shared_embedder_is_a_tensor_too_many(copy, take_apart):
    weights = take_apart(copy("w8_token") / WEIGHTS_FILE)
    first = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.bias"
    second = first.replace("blocks.0", "blocks.1")
    weights.write({second: weights.entries[first]})
    assert second in _why_refused(weights.path.parent)


def test_layers_outside_the_scheme_may_be_stored_in_half_precision(copy, take_apart):
    weights = take_apart(copy("w8_token") / WEIGHTS_FILE)
    _, shape, data = weights.entries["proj_out_2.bias"]
    half = torch.frombuffer(bytearray(data), dtype=torch.float32).half()
    weights.write({"proj_out_2.bias": ["F16", shape, half.numpy().tobytes()]})
    model = DiTTransformer2DModel.from_pretrained(weights.path.parent)
    assert torch.equal(model.proj_out_2.bias, half.float())


def _edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def _group_size(size):
    def change(q):
        for entry in q["scheme"]["formats"].values():
            if entry["group_size"] is not None:
                entry["group_size"] = size

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q: q.update(format_version=3), "format_version 3 is not one of (1, 2)"),
        (lambda q: q.update(format_version="1"), "format_version '1' is not one of (1, 2)"),
        (lambda q: q.update(format_version=None), "format_version None is not one of (1, 2)"),
        (lambda q: q.pop("format_version"), "format_version is missing"),
        (lambda q: q.pop("scheme"), "scheme is missing"),
        (lambda q: q.update(scheme=None), "scheme: expected an object"),
        (lambda q: q.update(extra=1), "unknown keys ['extra']"),
        (lambda q: q["scheme"].update(extra=1), "scheme: missing keys [], unknown keys ['extra']"),
        (lambda q: q["scheme"].pop("layers"), "missing keys ['layers']"),
        (lambda q: q["scheme"]["layers"].popitem(), "unknown tensor"),
        (lambda q: q["scheme"]["layers"].update(nowhere="w4p32_weight_only"), "nowhere: listed"),
        (
            lambda q: q["scheme"]["layers"].update(pos_embed="w4p32_weight_only"),
            "pos_embed: listed",
        ),
        (lambda q: q["scheme"]["layers"].update({Q: "w4p32_weight_only"}), f"{Q}."),
        (
            lambda q: q["scheme"].update(architecture="PixArt"),
            "but its scheme was written for 'PixArt'",
        ),
        (lambda q: q["scheme"].update(shared_embedder=False), "norm1.emb."),
        (_group_size(128), "multiple of 32 that divides the 64 inputs, got 128"),
        (_group_size(48), "multiple of 32 that divides the 64 inputs, got 48"),
        (_group_size(0), "group_size must be a count of at least 1"),
        (_group_size(64), "group_"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(copy, change, sentence):
    folder = copy("w4p_static")
    _edit_config(folder, change)
    assert sentence in _why_refused(folder)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (128, "multiple of 32 that divides the 64 inputs, got 128"),
        (48, "multiple of 32 that divides the 64 inputs, got 48"),
        (None, "group_size belongs to w4p and w4g and only there"),
        (64, "weight_scale: shape"),
    ],
)
def test_real_groups_that_do_not_fit_are_refused(copy, size, sentence):
    folder = copy("w4g_static")

    def change(q):
        for entry in q["scheme"]["formats"].values():
            if entry["weights"] == "w4g":
                entry["group_size"] = size

    _edit_config(folder, change)
    assert sentence in _why_refused(folder)


def test_a_config_that_is_cut_off_is_refused(copy):
    path = copy("w8_static") / "config.json"
    whole = path.read_text().rstrip()
    for offset in range(0, len(whole), len(whole) // 30):
        path.write_text(whole[:offset])
        assert "config.json" in _why_refused(path.parent)


def test_a_pickle_is_refused(copy, packed_folder, load):
    folder = copy("w8_token")
    (folder / WEIGHTS_FILE).unlink()
    state = load(packed_folder("w8_token")).state_dict()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    message = _why_refused(folder)
    assert "diffusion_pytorch_model.bin: a packed checkpoint is stored as safetensors" in message


@pytest.fixture
def sharded(packed_folder, load, tmp_path):
    """A transformer folder of several shards."""
    load(packed_folder("w8_static")).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    return tmp_path / "shards"


def test_a_missing_shard_is_refused_by_name(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        content = shard.read_bytes()
        shard.unlink()
        assert shard.name in _why_refused(sharded)
        shard.write_bytes(content)
    DiTTransformer2DModel.from_pretrained(sharded)


def test_a_cut_off_shard_is_refused_by_name(sharded):
    for shard in sorted(sharded.glob("*.safetensors")):
        size = shard.stat().st_size
        assert not _truncated(shard, [0, 5, 100, size // 2, size - 1])


def test_a_shard_without_one_of_its_tensors_is_refused(sharded, take_apart):
    weights = take_apart(sorted(sharded.glob("*.safetensors"))[1])
    tensor = next(iter(weights.entries))
    weights.write({tensor: None})
    assert tensor in _why_refused(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded, take_apart):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensor, entry = next(iter(take_apart(first).entries.items()))
    take_apart(second).write({tensor: entry})
    message = _why_refused(sharded)
    assert f"tensor {tensor} is stored in two shards" in message
    assert second.name in message


def test_headers_of_all_shards_are_merged(sharded, take_apart):
    files = sorted(sharded.glob("*.safetensors"))
    expected = {name for file in files for name in take_apart(file).entries}
    assert set(read_headers(map(str, files))) == expected


@pytest.mark.parametrize("version", [0, 3, "1", None, [1], True])
def test_other_versions_are_refused_with_the_cure(version):
    check_version(FORMAT_VERSION)
    with pytest.raises(CheckpointError, match=r"convert the model again, or install the ditq"):
        check_version(version)


def test_damage_is_refused_in_half_precision_and_on_a_device_map_too(copy, take_apart):
    weights = take_apart(copy("w8_static") / WEIGHTS_FILE)
    dtype, shape, _ = weights.entries[f"{SITE}.act_scale"]
    weights.write({f"{SITE}.act_scale": [dtype, shape, struct.pack("<f", float("nan"))]})
    assert f"{SITE}.act_scale" in _why_refused(weights.path.parent, dtype=torch.bfloat16)
    assert f"{SITE}.act_scale" in _why_refused(weights.path.parent, device_map={"": "cpu"})

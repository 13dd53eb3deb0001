"""Digests: the CRC of the bytes in the file, kept true by whatever writes one; a flipped bit is named."""

import json
import random
import shutil
import struct
import zlib

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

import ditq_runtime as ditq
from ditq_converters import Recipe, convert
from ditq_runtime.format.digests import SWITCH, digest
from ditq_runtime.host.verify import verify

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed DiT whose weights w8, w4p and w4g all occur, and floats in bf16."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=1, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=3,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("digests") / "out"
    recipe = Recipe("linear", "w4g", modulation="w4p", keep=("*.to_q",))
    convert(model.bfloat16(), recipe, out=out, quiet=True)
    return out


def stored_digests(folder):
    """Of the tensors; that of config.json has tests of its own."""
    stored = json.loads((folder / "config.json").read_text())["quantization_config"].get("digests")
    return {name: value for name, value in stored.items() if name != "config.json"}


def by_hand(path, digest):
    """Name -> digest, from the header and the bytes of a file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    made = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        made[name] = digest(f"{entry['dtype']} {entry['shape']}".encode(), data[begin:end])
    return made


def crc(head, data):
    return format(zlib.crc32(head + data), "08x")


def pages(head, data):
    """In Python's whole numbers."""
    text, whole = head, len(data) - len(data) % 4096
    for begin in range(0, whole, 4096):
        total = sum(struct.unpack("<512Q", data[begin : begin + 4096]))
        text += struct.pack("<Q", total % 2**64)
    return "page:" + format(zlib.crc32(text + data[whole:]), "08x")


def blocks(head, data):
    """What files had a while ago."""
    text, block = head, 64 * 256 * 8
    whole = len(data) - len(data) % block
    for begin in range(0, whole, block):
        words = struct.unpack("<16384Q", data[begin : begin + block])
        columns = [sum((2 * r + 1) * words[256 * r + c] for r in range(64)) for c in range(256)]
        text += struct.pack("<256Q", *(column % 2**64 for column in columns))
    return "sum:" + format(zlib.crc32(text + data[whole:]), "08x")


def test_they_are_sums_of_pages_then_a_crc(folder):
    made = by_hand(folder / FILE, pages)
    assert stored_digests(folder) == made
    assert verify(folder) == len(made) > 30


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 400_000])
def test_a_digest_of_any_size(size):
    generator = torch.Generator().manual_seed(size)
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    assert digest(tensor) == pages(f"U8 [{size}]".encode(), tensor.numpy().tobytes())


def test_it_sees_any_bit_and_pages_that_changed_places():
    tensor = torch.randint(0, 256, (300_000,), dtype=torch.uint8)
    expected, rng = digest(tensor), random.Random(0)
    for _ in range(200):
        other = tensor.clone()
        other[rng.randrange(len(tensor))] ^= 1 << rng.randrange(8)
        assert digest(other) != expected
    for size in (4096, 8192, 65536):
        other = tensor.clone()
        other[:size], other[2 * size : 3 * size] = tensor[2 * size : 3 * size], tensor[:size]
        assert digest(other) != expected, size


def test_what_it_does_not_see_is_what_the_page_of_the_format_says():
    """Changes of one page that cancel in its sum; the same in two pages are seen, and so is either alone."""
    words = torch.arange(1, 1025, dtype=torch.int64)  # two pages
    expected = digest(words)
    for other_place, seen in ((1, False), (511, False), (512, True)):
        swapped, moved = words.clone(), words.clone()
        swapped[0], swapped[other_place] = words[other_place], words[0]
        moved[0] += 5
        assert digest(moved) != expected
        moved[other_place] -= 5
        for changed in (swapped, moved):
            assert (digest(changed) != expected) is seen
    one_set, page = torch.zeros(512, dtype=torch.int64), torch.zeros(512, dtype=torch.int64)
    page[0], one_set[1] = 1 << 40, 1 << 40  # one bit cleared, the same bit of another word set
    assert digest(one_set) == digest(page)


@pytest.mark.parametrize("kind", [crc, blocks])
def test_digests_of_earlier_files_are_compared_too(folder, tmp_path, kind):
    shutil.copytree(folder, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["quantization_config"]["digests"] = by_hand(folder / FILE, kind)
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert verify(tmp_path / "old") > 30
    DiTTransformer2DModel.from_pretrained(tmp_path / "old")
    name = damage(tmp_path / "old" / FILE, 123_456)
    with pytest.raises(ditq.CheckpointError, match=name):
        verify(tmp_path / "old")
    with pytest.raises(ditq.CheckpointError, match=name):
        DiTTransformer2DModel.from_pretrained(tmp_path / "old")


def test_a_kind_of_later_versions_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    later = {name: "sha:00" for name in stored_digests(folder)}
    config["quantization_config"]["digests"] = later
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ditq.CheckpointError, match="unknown kind, 'sha:00'; update ditq"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "new")


def damage(path, offset):
    """Flip a bit of the data of a file; the name of the tensor that it is in."""
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    offset %= len(raw) - 8 - length
    raw[8 + length + offset] ^= 8
    path.write_bytes(raw)
    held = {n: e["data_offsets"] for n, e in header.items()}
    return next(name for name, (begin, end) in held.items() if begin <= offset < end)


def test_whatever_saves_a_model_keeps_them_true(folder, tmp_path):
    model = DiTTransformer2DModel.from_pretrained(folder)
    model.transformer_blocks[0].attn1.to_k.bias.data[0] += 1
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = stored_digests(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    changed = {n for n, d in stored_digests(folder).items() if d != again[n]}
    assert "transformer_blocks.0.attn1.to_k.bias" in changed
    assert verify(tmp_path / "again") == len(again)
    DiTTransformer2DModel.from_pretrained(tmp_path / "again")
    assert "digests" not in model.config.quantization_config.to_dict()  # those of a file only


def test_equal_models_are_equal_files(folder, tmp_path):
    model = DiTTransformer2DModel.from_pretrained(folder)
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    for file in ("config.json", FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_copies_without_digests_load(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]["digests"]
    (copy / "config.json").write_text(json.dumps(config))
    save_file(load_file(copy / FILE), copy / FILE, {"format": "pt"})
    state = DiTTransformer2DModel.from_pretrained(copy).state_dict()
    for name, tensor in DiTTransformer2DModel.from_pretrained(folder).state_dict().items():
        assert torch.equal(state[name], tensor)
    assert verify(copy) == 0


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_is_named(folder, tmp_path, seed, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")
    raw, rng = bytearray((copy / FILE).read_bytes()), random.Random(seed)
    begin = 8 + struct.unpack("<Q", raw[:8])[0]
    where = rng.randrange(begin, len(raw))
    raw[where] ^= 1 << rng.randrange(8)
    (copy / FILE).write_bytes(raw)
    header = json.loads(raw[8:begin])
    header.pop("__metadata__")
    (name,) = (
        n for n, e in header.items() if e["data_offsets"][0] <= where - begin < e["data_offsets"][1]
    )
    for look in (DiTTransformer2DModel.from_pretrained, verify):
        with pytest.raises(ditq.CheckpointError) as caught:
            look(copy)
        assert f"{FILE}: {name} is damaged: its digest is" in str(caught.value)
    if (
        seed < 5
    ):  # where it leaves values that may be: in the label embedding, by far the largest tensor
        monkeypatch.setenv(SWITCH, "0")
        DiTTransformer2DModel.from_pretrained(copy)


@pytest.mark.parametrize(
    ("digests", "sentence"),
    [
        ("all", "digests must be of type dict, got 'all'"),
        ({"proj_out_2.bias": 3}, "proj_out_2.bias must be of type str, got 3"),
        ({"proj_out_2.bias": "00000000"}, "digests: .* is missing; the config.json is damaged"),
    ],
)
def test_damaged_digests_are_refused(folder, tmp_path, digests, sentence):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["digests"] = digests
    (copy / "config.json").write_text(json.dumps(config))
    for look in (DiTTransformer2DModel.from_pretrained, verify):
        with pytest.raises(ditq.CheckpointError, match=sentence):
            look(copy)

"""Headers read by hand equal what the safetensors library reads, and damage is refused."""

import json
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ditq_runtime import CheckpointError
from ditq_runtime.format.safetensors_header import read_header

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def _file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _entry(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _library_reads(path):
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except SafetensorError:
        return None


def test_it_reads_what_safetensors_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {f"t{i}": torch.zeros(i, 3, dtype=dtype) for i, dtype in enumerate(DTYPES)}
    tensors["scalar"] = torch.tensor(1.5)
    save_file(tensors, path, metadata={"ditq": "1"})

    found = read_header(path)
    with safe_open(path, "pt") as file:
        assert set(found) == set(file.keys()) == set(tensors)
        for name, info in found.items():
            tensor = file.get_tensor(name)
            assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
            assert info.nbytes == tensor.numel() * tensor.element_size()


def test_a_file_without_tensors_is_read(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors") == {}


def test_cut_off_at_any_byte_or_with_bytes_added_it_is_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.int8)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=rf"{len(whole) + 1} bytes on disk, {len(whole)} exp"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"null",
        b"[" * 100_000,
        {"a": 3},
        {"a": {}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"shape": [2], "data_offsets": [0, 8]}},
        {"a": _entry(dtype="F31")},
        {"a": _entry(dtype=["F32"])},
        {"a": _entry(shape=(3,))},
        {"a": _entry(shape=(-2,))},
        {"a": _entry(shape=(-2, -1))},
        {"a": _entry(shape=(2.5,))},
        {"a": _entry(shape=("2",))},
        {"a": _entry(shape=(2**70,))},
        {"a": _entry(shape=(2**40, 2**40))},
        {"a": {**_entry(), "shape": "2"}},
        {"a": {**_entry(), "shape": 2}},
        {"a": {**_entry(), "data_offsets": [8]}},
        {"a": {**_entry(), "data_offsets": [0, 4, 8]}},
        {"a": {**_entry(), "data_offsets": [0.0, 8.0]}},
        {"a": {**_entry(), "data_offsets": "08"}},
        {"a": _entry(-8, 0), "b": _entry()},
        {"a": _entry(), "b": _entry()},  # two tensors in one place
        {"a": _entry(0, 4, shape=(1,)), "b": _entry(2, 8, "I16", (3,))},  # overlap
        {"b": _entry(4, 8, shape=(1,))},  # a hole at the beginning
    ],
    ids=lambda header: str(header)[:60],
)
def test_malformed_headers_are_refused_by_name(tmp_path, header):
    path = _file(tmp_path / "x.safetensors", header, b"\0" * 8)
    assert _library_reads(path) is None  # the library agrees that this is damage
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(path)


def test_a_changed_byte_of_the_header_never_raises_anything_else(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.int8)}, path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    messages = []
    for offset in range(8 + length):
        for flip in (1, 4, 16, 128):
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ flip]) + whole[offset + 1 :])
            try:
                read_header(path)
            except CheckpointError as error:
                messages.append(str(error))
    assert all("x.safetensors" in message for message in messages)
    assert len(messages) > 2 * length  # what is left are other names, which the caller compares

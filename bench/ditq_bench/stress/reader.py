"""Damaged folders through the reader alone: headers, configs, shards, data, LoRA files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ditq_bench.stress import mutate
from ditq_bench.stress.outcome import Tally, bounded, timed
from ditq_bench.stress.target import FILE, INDEX, Target, index_of
from ditq_runtime.format.digests import config_digest
from ditq_runtime.format.folder import TransformerFolder, open_folder
from ditq_runtime.host import check
from ditq_runtime.host.verify import verify
from ditq_runtime.lora.file import read_adapters

Case = Callable[[Target, Target, random.Random], tuple[str, Callable[[], bool]]]


def attack(one: Target, shards: Target, cases: int, seed: int) -> list[Tally]:
    """Read damaged copies, `cases` in all, as many of each kind.

    Args:
        one: a folder with one file.
        shards: one with several.
        cases: at least one a kind.
        seed: of the damages; each case has a random source of its own.
    """
    tallies = []
    with bounded():
        for kind, make in KINDS.items():
            tally = Tally(f"reader: {kind}", seed)
            for number in range(max(1, cases // len(KINDS))):
                run_case(tally, number, make, one, shards)
            tallies.append(tally)
    return tallies


def run_case(tally: Tally, number: int, make: Case, one: Target, shards: Target) -> None:
    """Damage, look, and make whole again."""
    what, look = make(one, shards, random.Random(f"{tally.kind} {tally.seed} {number}"))
    try:
        with timed():
            right = look()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        tally.add(number, what, error)
    else:
        tally.add(number, what, None, right)
    one.restore()
    shards.restore()


def read(target: Target) -> TransformerFolder:
    """All that the reader looks at before a weight is read."""
    folder = open_folder(target.folder)
    folder.check_config()
    _ = folder.digests
    check.check_tensors(folder.headers, target.model)
    return folder


def is_whole(target: Target, folder: TransformerFolder) -> bool:
    """The folder says what it said before it was damaged."""
    found = {name: (info.dtype, info.shape) for name, info in folder.headers.items()}
    return found == target.headers and config_digest(folder.config) == config_digest(target.config)


def _header(one: Target, shards: Target, rng: random.Random) -> tuple[str, Callable[[], bool]]:
    """The header as bytes, or an entry of it; the data is a hole until the header passes."""
    raw, data = one.header()
    if rng.random() < 0.5:
        raw, what = mutate.bytes_of(raw, rng)
    else:
        text, what = mutate.json_of(json.loads(raw[8:]), rng)
        raw = len(text.encode()).to_bytes(8, "little") + text.encode()
    file = one.folder / FILE
    with file.open("wb") as opened:
        opened.write(raw)
        opened.truncate(len(raw) + data)

    def look() -> bool:
        folder = read(one)
        file.write_bytes(raw + one.files[FILE][-data:])
        verify(one.folder)
        return is_whole(one, folder) and _same_tensors(file, one)

    return what, look


def _same_tensors(file: Path, target: Target) -> bool:
    state = load_file(file)
    return state.keys() == target.state.keys() and all(
        torch.equal(tensor, target.state[name]) for name, tensor in state.items()
    )


def _config(one: Target, shards: Target, rng: random.Random) -> tuple[str, Callable[[], bool]]:
    raw = one.files["config.json"]
    if rng.random() < 0.3:
        damaged, what = mutate.bytes_of(raw, rng)
    else:
        text, what = mutate.json_of(json.loads(raw), rng)
        damaged = text.encode("utf-8", "surrogatepass")
    (one.folder / "config.json").write_bytes(damaged)
    return what, lambda: is_whole(one, read(one))


def _shards(one: Target, shards: Target, rng: random.Random) -> tuple[str, Callable[[], bool]]:
    """The index, or files that are gone, too many, cut off, or in each other's place."""
    files = sorted(name for name in shards.files if name.endswith(".safetensors"))
    a, b = (shards.folder / name for name in rng.sample(files, 2))
    how = rng.choice(("index", "index", "gone", "again", "swapped", "cut off", "a pipe"))
    if how == "index":
        text, what = mutate.json_of(index_of(shards), rng)
        (shards.folder / INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
        return what, lambda: is_whole(shards, read(shards))
    if how == "gone":
        a.unlink()
    elif how == "again":
        b.with_name("diffusion_pytorch_model-x.safetensors").write_bytes(b.read_bytes())
    elif how == "swapped":
        one_file, other = a.read_bytes(), b.read_bytes()
        a.write_bytes(other)
        b.write_bytes(one_file)
    elif how == "cut off":
        a.write_bytes(mutate.BYTES["cut off"](bytearray(a.read_bytes()), rng))
    else:
        a.unlink()
        a.mkdir()
    return how, lambda: is_whole(shards, read(shards))


def _data(one: Target, shards: Target, rng: random.Random) -> tuple[str, Callable[[], bool]]:
    """Bytes of tensors; what is refused must be refused by the name of a tensor that was hit."""
    raw, begin = bytearray(one.files[FILE]), len(one.header()[0])
    how = rng.choice(("flipped", "zeroed", "noise"))
    data = mutate.BYTES[how](raw[begin:], rng)
    (one.folder / FILE).write_bytes(raw[:begin] + data)
    hit = {name for name, tensor in load_file(one.folder / FILE).items()
           if not _equal(tensor, one.state[name])}  # fmt: skip

    def look() -> bool:
        try:
            verify(one.folder)
        except ValueError as error:
            if not any(f": {name} is damaged" in str(error) for name in hit):
                raise AssertionError(f"{error} names none of {sorted(hit)}") from error
            raise
        return not hit

    return how, look


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit: a NaN equals itself."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _lora(one: Target, shards: Target, rng: random.Random) -> tuple[str, Callable[[], bool]]:
    """A LoRA file with metadata; a result is right whose tensors, names and strength are."""
    name, file = "transformer.transformer_blocks.0.attn1.to_q", one.folder / "lora.safetensors"
    down, up = torch.arange(64.0).reshape(2, 32), torch.ones(32, 2)
    state = {
        f"{name}.lora_A.weight": down,
        f"{name}.lora_B.weight": up,
        f"{name}.alpha": torch.tensor(4.0),
    }
    stored = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.use_dora": False}
    save_file(state, file, metadata={"lora_adapter_metadata": json.dumps(stored)})
    damaged, what = mutate.bytes_of(file.read_bytes()[: -down.nbytes - up.nbytes], rng)
    file.write_bytes(damaged + file.read_bytes()[-down.nbytes - up.nbytes :])

    def look() -> bool:
        read_adapters(file)  # it has no digests: whatever is a LoRA may be meant
        return True

    return what, look


KINDS: dict[str, Case] = {
    "header": _header, "config": _config, "shards": _shards, "data": _data, "lora": _lora,
}  # fmt: skip


def any_case(rng: random.Random) -> Case:
    """A kind of damage to a folder."""
    return rng.choice([_header, _config, _shards, _data])

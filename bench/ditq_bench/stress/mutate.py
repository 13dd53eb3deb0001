"""Damage to bytes and to JSON, from a random source."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

DEEP = "[" * 3000 + "]" * 3000
NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, 2**64 - 1, 10**30, -(10**18), 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "x" * 5000, "\x00", "ß\ud7ff", "../../../etc/passwd", "w8", "config.json", [], {}, [[]], [0], [None],
    {"": 0}, ["x"] * 300,
)  # fmt: skip


def bytes_of(raw: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Bytes with one damage, and its name."""
    name, damage = rng.choice(list(BYTES.items()))
    return damage(bytearray(raw), rng), name


def _flip(raw: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def _piece(raw: bytearray, rng: random.Random) -> slice:
    begin = rng.randrange(len(raw))
    return slice(begin, begin + rng.choice((1, 1, 2, 4, 16, 64, 512, 4096)))


def _cut(raw: bytearray, rng: random.Random) -> bytes:
    return bytes(raw[: rng.randrange(len(raw))])


def _remove(raw: bytearray, rng: random.Random) -> bytes:
    del raw[_piece(raw, rng)]
    return bytes(raw)


def _double(raw: bytearray, rng: random.Random) -> bytes:
    piece = _piece(raw, rng)
    return bytes(raw[: piece.stop] + raw[piece] + raw[piece.stop :])


def _zero(raw: bytearray, rng: random.Random) -> bytes:
    piece = _piece(raw, rng)
    raw[piece] = bytes(len(raw[piece]))
    return bytes(raw)


def _noise(raw: bytearray, rng: random.Random) -> bytes:
    piece = _piece(raw, rng)
    raw[piece] = rng.randbytes(len(raw[piece]))
    return bytes(raw)


def _digit(raw: bytearray, rng: random.Random) -> bytes:
    """Of a text: one digit becomes another, or nines."""
    places = [i for i, byte in enumerate(raw[:20_000]) if 48 <= byte < 58]
    if places:
        i = rng.choice(places)
        raw[i : i + 1] = rng.choice(
            (b"9" * 18, b"-1", b"0", b"1e9", bytes([rng.randrange(48, 58)]))
        )
    return bytes(raw)


BYTES: dict[str, Callable[[bytearray, random.Random], bytes]] = {
    "flipped": _flip, "cut off": _cut, "removed": _remove, "doubled": _double, "zeroed": _zero,
    "noise": _noise, "another digit": _digit,
}  # fmt: skip


def json_of(content: Any, rng: random.Random) -> tuple[str, str]:
    """The text of a JSON value with one damage, and its name."""
    damaged = copy.deepcopy(content)
    path, parent, key = _place(damaged, rng)
    how = rng.choice(("replaced", "replaced", "replaced", "removed", "renamed", "moved", "deep"))
    if how == "replaced":
        parent[key] = rng.choice(NASTY)
    elif how == "removed":
        del parent[key]
    elif how == "renamed" and isinstance(parent, dict):
        parent[rng.choice(("", "x", key + "x", key[:-1]))] = parent.pop(key)
    elif how == "moved":
        _, other, place = _place(content, rng)
        parent[key] = copy.deepcopy(other[place])
    else:
        parent[key] = "DEEP"
        return json.dumps(damaged).replace('"DEEP"', DEEP), f"{path} deep"
    return json.dumps(damaged), f"{path} {how}"


def _place(content: Any, rng: random.Random) -> tuple[str, Any, Any]:
    """A random member of a random object or list: its path, where it is, and its key there."""
    path, parent = "", content
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = rng.choice(keys)
        path, value = f"{path}/{key}", parent[key]
        if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
            return path, parent, key
        parent = value

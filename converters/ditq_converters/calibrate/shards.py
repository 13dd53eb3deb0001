"""One folder per input: what its run showed, with the identity of model, input and settings.

    stats/inputs/0003/shard.json          identity; visits (component, timestep) in the order of the run; kept calls
    stats/inputs/0003/0000.safetensors    V/SITE.min and .max, fp32 [K], of visit V; V/SITE.rows [n, K] and .keys [n];
                                          V/MODULATION.input and .input_keys; further files when one is full
    stats/inputs/0003/replay.safetensors  tensors of the calls that were kept whole: R/I of call R

The folder appears by a rename when the input is done. While it is made a lock says whose it is; a crash lets go of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ditq_converters.calibrate.errors import StatisticsError
from ditq_converters.calibrate.memory import SPILL
from ditq_converters.calibrate.recorder import Visit
from ditq_converters.calibrate.transformer_calls import TransformerCall, from_store, to_store
from ditq_runtime.files import write_json

META, REPLAY = "shard.json", "replay.safetensors"


def shard_folder(folder: Path, index: int) -> Path:
    """The folder of one input."""
    return folder / "inputs" / f"{index:04d}"


class ShardWriter:
    """Takes visits and keeps at most SPILL bytes of them in memory."""

    def __init__(self, folder: Path) -> None:
        """Write into a folder that is there."""
        self._folder = folder
        self._pending: dict[str, torch.Tensor] = {}
        self._files = 0
        self.visits: list[dict[str, Any]] = []

    def add(self, visit: Visit) -> None:
        """Take one visit."""
        prefix = f"{len(self.visits)}/"
        for site, (low, high) in visit.ranges.items():
            self._pending |= {f"{prefix}{site}.min": low, f"{prefix}{site}.max": high}
        for kept, field in ((visit.rows, ""), (visit.modulation, "input_")):
            for site, rows in kept.items():
                self._pending[f"{prefix}{site}.{field}rows"] = rows.rows
                self._pending[f"{prefix}{site}.{field}keys"] = rows.keys
        self.visits.append({"component": visit.component, "timestep": visit.timestep})
        if sum(tensor.nbytes for tensor in self._pending.values()) >= SPILL:
            self._spill()

    def finish(self, identity: dict[str, Any], calls: list[TransformerCall]) -> None:
        """Write the rest."""
        self._spill()
        tensors: dict[str, torch.Tensor] = {}
        described = []
        for number, call in enumerate(calls):
            stored = to_store(call.args, call.kwargs)
            if stored is not None:
                text, parts = stored
                tensors |= {f"{number}/{i}": part.contiguous() for i, part in enumerate(parts)}
                described.append(
                    {
                        "number": number,
                        "component": call.component,
                        "timestep": call.timestep,
                        "arguments": text,
                    }
                )
        _save(tensors, self._folder / REPLAY)
        write_json(self._folder / META, {**identity, "visits": self.visits, "replay": described})

    def _spill(self) -> None:
        if self._pending:
            _save(self._pending, self._folder / f"{self._files:04d}.safetensors")
            self._pending, self._files = {}, self._files + 1


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@dataclass(frozen=True)
class Shard:
    """One input's statistics, as they lie on disk.

    Attributes:
        folder: of the input.
        meta: parsed shard.json.
        visits: per visit, SITE.field -> the file that it is in, and its length.
    """

    folder: Path
    meta: dict[str, Any]
    visits: list[dict[str, tuple[Path, int]]]

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any]) -> Shard:
        """Open a finished shard; StatisticsError if it is damaged, or of another model, input or settings."""
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            visits: list[dict[str, tuple[Path, int]]] = [{} for _ in meta["visits"]]
            for path in sorted(folder.glob("*.safetensors")):
                if path.name != REPLAY:
                    with safe_open(path, "pt") as file:
                        for name in file.keys():  # noqa: SIM118  no mapping
                            visit, _, rest = name.partition("/")
                            visits[int(visit)][rest] = path, file.get_slice(name).get_shape()[0]
        except (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise StatisticsError(
                f"{folder}: cannot be read ({error}); delete it and run the same `ditq calibrate` again"
            ) from error
        for key, value in identity.items():
            if meta.get(key) != value:
                raise StatisticsError(
                    f"{folder}: was made of another {key}; delete it and run the same `ditq calibrate` again"
                )
        return cls(folder, meta, visits)

    def read(self, visit: int, names: Iterable[str], handles: Handles) -> dict[str, torch.Tensor]:
        """SITE.field -> tensor of one visit, of those names that it has."""
        there = self.visits[visit]
        return {
            name: handles.get(there[name][0]).get_tensor(f"{visit}/{name}")
            for name in names
            if name in there
        }

    def calls(self) -> Iterator[TransformerCall]:
        """The calls that were kept whole."""
        if not self.meta["replay"]:
            return
        with safe_open(self.folder / REPLAY, "pt") as file:
            for entry in self.meta["replay"]:
                count = entry["arguments"].count('{"tensor":')
                tensors = [file.get_tensor(f"{entry['number']}/{i}") for i in range(count)]
                args, kwargs = from_store(entry["arguments"], tensors)
                yield TransformerCall(entry["component"], entry["timestep"], args, kwargs)


class Handles:
    """The files that were read last, open: to parse a header costs more than to read a tensor."""

    def __init__(self, most: int = 2 * SPILL) -> None:
        """Keep at most so many bytes of files open, and the last one always; what they map may stay in memory."""
        self._most = most
        self._open: dict[Path, tuple[Any, int]] = {}

    def get(self, path: Path) -> Any:
        """The file."""
        if path not in self._open:
            try:
                size, file = path.stat().st_size, safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise StatisticsError(
                    f"{path}: cannot be read ({error}); delete {path.parent} and calibrate again"
                ) from error
            while self._open and size + sum(held for _, held in self._open.values()) > self._most:
                del self._open[next(iter(self._open))]
            self._open[path] = file, size
        return self._open[path][0]

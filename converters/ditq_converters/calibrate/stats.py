"""Calibration statistics: what is read from them, one site at a time.

    stats/manifest.json    models with the sites that were found on them, settings, inputs: what they belong to
    stats/inputs/          one folder per input (`shards`)
    stats/merged/          what is read (`merge`): per transformer one file per timestep, the noisiest first
    stats/calibrate.log    progress, with times; nobody reads it but people

Version 1 (one sampler, one set of classes or prompts) had the files of `merged/transformer` beside its manifest. It is
read; it has no rows of modulation and no calls to replay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ditq_converters.calibrate.errors import StatisticsError
from ditq_converters.calibrate.shards import Shard, shard_folder
from ditq_converters.calibrate.transformer_calls import TransformerCall
from ditq_converters.streaming.model import streamed_of, tensors_of
from ditq_runtime.families import family_of
from ditq_runtime.files import write_json

STATISTICS_VERSION = 2
KEYS: dict[Any, tuple[str, ...]] = {
    1: ("calls", "timesteps", "plan", "sampler", "model_hash"),
    2: ("models", "settings", "inputs", "sampler"),
}
MERGED, MERGED_INPUTS, SCHEDULE = "merged", "inputs.json", "schedule.json"
TRANSFORMER = "transformer"

__all__ = [
    "CalibrationStats",
    "StatisticsError",
    "model_hash",
    "read_manifest",
    "shard_path",
    "write_manifest",
]


def model_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's tensors, in the order of their names."""
    streamed = streamed_of(model)
    if streamed is None:
        return _hash(model)
    if streamed.model_hash is None:  # of a file that stays as it is: once
        streamed.model_hash = _hash(model)
    return streamed.model_hash


def _hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors_of(model, in_order=True):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shard_path(folder: Path, call: int) -> Path:
    """The file of one timestep."""
    return folder / f"call_{call:04d}.safetensors"


@dataclass(frozen=True)
class CalibrationStats:
    """Complete statistics in a folder, of one transformer.

    Attributes:
        folder: where they are.
        manifest: parsed manifest.json.
        component: which transformer of the pipeline; see `of`.
    """

    folder: Path
    manifest: dict[str, Any]
    component: str = TRANSFORMER

    @classmethod
    def open(cls, folder: str | Path) -> CalibrationStats:
        """Open a finished calibration; StatisticsError if it is missing, unfinished, damaged or mixed up."""
        folder = Path(folder)
        opened = cls(folder, read_manifest(folder))
        if opened._is_version1:
            for call in range(opened.calls):
                if not shard_path(folder, call).exists():
                    raise StatisticsError(
                        f"{folder}: call {call} of {opened.calls} is missing; calibrate again into a new folder"
                    )
            return opened
        list(opened.shards())
        if opened.merged_inputs != opened.manifest["inputs"]:
            raise StatisticsError(
                f"{folder}: its inputs are not merged yet; run the same `ditq calibrate` command again"
            )
        return opened if TRANSFORMER in opened.components else opened.of(opened.components[0])

    @property
    def _is_version1(self) -> bool:
        """Whether an earlier ditq recorded them: one folder of shards, merged as they were made."""
        return bool(self.manifest["version"] == 1)

    @property
    def components(self) -> list[str]:
        """The transformers that were watched."""
        return sorted(self.manifest["models"])

    def of(self, component: str) -> CalibrationStats:
        """The statistics of another transformer of the pipeline, such as `transformer_2`; StatisticsError if none."""
        if component not in self.components:
            raise StatisticsError(
                f"{self.folder}: holds statistics of {', '.join(self.components)}, not of {component}"
            )
        return replace(self, component=component)

    @cached_property
    def _schedule(self) -> dict[str, Any]:
        if self._is_version1:
            scale = family_of(self.manifest["architecture"]).timestep_scale
            rows = self.manifest.get("rows", {}).get("calls", ())
            return {"timesteps": [scale * t for t in self.manifest["timesteps"]], "row_calls": rows}
        path = self._calls_folder / SCHEDULE
        try:
            schedule: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StatisticsError(
                f"{path}: cannot be read ({error}); run the same `ditq calibrate` command again"
            ) from error
        return schedule

    @property
    def _calls_folder(self) -> Path:
        if self._is_version1:
            return self.folder
        return self.folder / MERGED / self.component

    @property
    def merged_inputs(self) -> list[str] | None:
        """Digests of the inputs that `merged` was made of; None if there is none."""
        path = self.folder / MERGED / MERGED_INPUTS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def calls(self) -> int:
        """Number of timesteps T."""
        return len(self._schedule["timesteps"])

    @property
    def timesteps(self) -> list[float]:
        """The timestep that the model was told at each, in its own units, noisiest first.

        Where inputs have different schedules each stands for its neighbours in noise (`schedule.schedule_of`).
        """
        return list(self._schedule["timesteps"])

    @property
    def differing_timesteps(self) -> int:
        """How many timesteps there were, where inputs have different schedules; 0 where each is one of `timesteps`."""
        if self._is_version1:
            return 0
        visits = (visit for shard in self.shards() for visit in shard.meta["visits"])
        met = {visit["timestep"] for visit in visits if visit["component"] == self.component}
        return len(met) if len(met) > self.calls else 0

    @property
    def has_attention(self) -> bool:
        """Whether the ranges of Q, K and V were recorded."""
        return bool(self.manifest["settings"].get("attention", False))

    @property
    def has_rows(self) -> bool:
        """Whether input rows were kept."""
        return bool(self._schedule["row_calls"])

    @property
    def has_replay(self) -> bool:
        """Whether rows, inputs of modulation and whole calls were kept, as rounding that is aimed reads them."""
        return self.has_rows and not self._is_version1

    @property
    def provenance(self) -> dict[str, Any]:
        """What a checkpoint says about the calibration that it was made with, JSON-safe."""
        plan = self.manifest.get("plan", {})
        given = {"inputs": len(self.manifest["inputs"])}
        if self._is_version1:
            given = {"guidance": plan.get("guidance"), "samples": len(plan.get("labels", ()))}
        return {
            "calls": self.calls,
            "sampler": self.manifest["sampler"],
            "model_hash": self.manifest["models"][self.component]["model_hash"],
            **given,
        }

    def ranges(self, site: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Minimum and maximum of a site, or of an operand of an attention: fp32 [T, K] each, noisiest first."""
        read = [self._read(call, site, "min", "max") for call in range(self.calls)]
        if not read:
            raise StatisticsError(f"{self.folder}: {self.component} never ran; give other inputs")
        low, high = (torch.stack(side) for side in zip(*read, strict=True))
        self._check_finite(site, low, high)
        return low, high

    def rows(self, site: str) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Sampled input rows of a site, for searches: of all inputs, streams of guidance and tokens alike.

        The same rows for all sites of a call that have as many.

        Returns:
            rows: [C, n, K] fp32. calls: the C calls they were sampled at, ascending.

        Raises:
            StatisticsError: none were kept, or a file is damaged.
        """
        calls = tuple(self._schedule["row_calls"])
        if not calls:
            raise StatisticsError(
                f"{self.folder}: holds no sampled rows; calibrate into a new folder with --rows 64"
            )
        rows = torch.stack([self._read(call, site, "rows")[0].float() for call in calls])
        self._check_finite(site, rows)
        return rows, calls

    def modulation(self, name: str) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Sampled inputs of a modulation linear.

        Args:
            name: full name of the linear.

        Returns:
            rows: [R, K] fp32. calls: the call of each row.

        Raises:
            StatisticsError: none were kept: by version 1, with rows off, or for a linear that never ran.
        """
        if self._is_version1:
            raise StatisticsError(
                f"{self.folder}: version 1 kept no inputs of modulation; calibrate again into a new folder"
            )
        parts = [self._read(call, name, "input")[0].float() for call in range(self.calls)]
        rows = torch.cat(parts)
        self._check_finite(name, rows)
        return rows, tuple(call for call, part in enumerate(parts) for _ in part)

    def replay(self) -> Iterator[TransformerCall]:
        """Calls of this transformer that were kept with all their arguments, a bounded number, input by input.

        Raises:
            StatisticsError: version 1 kept none, or a file is damaged.
        """
        if self._is_version1:
            raise StatisticsError(
                f"{self.folder}: version 1 kept no calls to replay; calibrate again into a new folder"
            )
        for shard in self.shards():
            yield from (call for call in shard.calls() if call.component == self.component)

    def shards(self) -> Iterator[Shard]:
        """Every input's; StatisticsError for the first that is missing, damaged or of something else."""
        for index in range(len(self.manifest["inputs"])):
            folder = shard_folder(self.folder, index)
            if not folder.exists():
                raise StatisticsError(
                    f"{self.folder}: input {index} of {len(self.manifest['inputs'])} is missing; run the same "
                    "`ditq calibrate` command again, it resumes"
                )
            yield Shard.open(folder, identity(self.manifest, index))

    def _read(self, call: int, site: str, *fields: str) -> list[torch.Tensor]:
        path = shard_path(self._calls_folder, call)
        try:
            with safe_open(path, "pt") as file:
                return [file.get_tensor(f"{site}.{field}") for field in fields]
        except (SafetensorError, OSError) as error:
            raise StatisticsError(
                f"{path}: cannot read {site} ({error}); calibrate again"
            ) from error

    def _check_finite(self, site: str, *tensors: torch.Tensor) -> None:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise StatisticsError(
                f"{self.folder}: {site} holds values that are not finite; calibrate again"
            )

    def check_model(self, model: nn.Module) -> None:
        """StatisticsError if they were taken from another model."""
        if self.manifest["models"][self.component]["model_hash"] != model_hash(model):
            raise StatisticsError(
                f"{self.folder}: these statistics belong to another model (its weights differ); "
                "calibrate this model into a new folder"
            )


def identity(manifest: dict[str, Any], index: int) -> dict[str, Any]:
    """What a shard must say it was made of."""
    return {
        "model": {name: model["model_hash"] for name, model in manifest["models"].items()},
        "settings": manifest["settings"],
        "input": manifest["inputs"][index],
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Parse manifest.json; StatisticsError with the cure."""
    path = folder / "manifest.json"
    if not path.exists():
        raise StatisticsError(
            f"{folder}: no manifest.json there; make it with `ditq calibrate MODEL --out {quote(str(folder))}`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StatisticsError(f"{path}: not valid JSON ({error}); calibrate again") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or version not in KEYS:
        raise StatisticsError(
            f"{path}: version {version!r}, this ditq reads 1 and {STATISTICS_VERSION}; calibrate again"
        )
    missing = [key for key in KEYS[version] if key not in manifest]
    if missing:
        raise StatisticsError(f"{path}: lacks {', '.join(missing)}; calibrate again")
    return manifest if version == STATISTICS_VERSION else _as_version2(manifest)


def _as_version2(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 1 with what version 2 has; the classes it knew first were DiT's."""
    model = {"architecture": "DiTTransformer2DModel", **manifest}
    settings = {"attention": manifest.get("attention", False)}
    return {**model, "models": {TRANSFORMER: model}, "settings": settings, "inputs": []}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Store what the statistics belong to."""
    write_json(folder / "manifest.json", {"version": STATISTICS_VERSION, **manifest})

"""Calibration statistics on disk: one shard per model call, a manifest that says what they belong to.

    stats/manifest.json             plan, sampler, model hash, versions, sites and their widths
    stats/call_0000.safetensors     per site: SITE.min and SITE.max, fp32 [K], and at the calls that the manifest
                                    lists SITE.rows, [n, K] in the model's dtype; call 0 is the noisiest. With
                                    "attention" in the manifest also MODULE.q, .k and .v, .min and .max, fp32
                                    [H * D]: of the operands of every attention
    stats/state.safetensors         latents and sampler history after the last complete call, to resume from;
                                    removed at the end

A shard appears by atomic rename when its call is complete, so memory does not grow with the number of calls.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ditq_converters.streaming.model import streamed_of, tensors_of
from ditq_runtime.files import atomic_file, write_json

STATISTICS_VERSION = 1
KEYS = ("calls", "timesteps", "plan", "sampler", "model_hash")


class StatisticsError(ValueError):
    """Statistics are incomplete, damaged, or belong to another model or plan."""


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
    """The file of one call."""
    return folder / f"call_{call:04d}.safetensors"


def write_shard(
    folder: Path,
    call: int,
    ranges: dict[str, tuple[torch.Tensor, torch.Tensor]],
    rows: dict[str, torch.Tensor] | None = None,
) -> None:
    """Store site -> (min [K], max [K]), and site -> rows [n, K] if there are any, of one complete call."""
    tensors = {}
    for site, (low, high) in ranges.items():
        tensors[f"{site}.min"], tensors[f"{site}.max"] = low.contiguous(), high.contiguous()
    for site, kept in (rows or {}).items():
        tensors[f"{site}.rows"] = kept.contiguous()
    _save(tensors, shard_path(folder, call), {"call": str(call)})


@dataclass(frozen=True)
class ResumePoint:
    """Where a run stopped.

    Attributes:
        call: the last complete call.
        latents: [S, C, H, W] fp32 after it.
        history: what the sampler remembers of earlier calls (`samplers.history`).
    """

    call: int
    latents: torch.Tensor
    history: dict[str, torch.Tensor]


def write_state(folder: Path, point: ResumePoint) -> None:
    """Store where to resume from."""
    tensors = {"latents": point.latents, **point.history}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _save(tensors, folder / "state.safetensors", {"call": str(point.call)})


def read_state(folder: Path) -> ResumePoint | None:
    """Where to resume from; None if nothing is there."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            call = int(file.metadata()["call"])
            history = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        return ResumePoint(call, history.pop("latents"), history)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise StatisticsError(
            f"{path}: the resume point is damaged ({error}); delete the file to start over"
        ) from error


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    with atomic_file(path) as part:
        save_file(tensors, part, metadata=metadata)


@dataclass(frozen=True)
class CalibrationStats:
    """Complete statistics in a folder, read one site at a time.

    Attributes:
        folder: where they are.
        manifest: parsed manifest.json.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> CalibrationStats:
        """Open a finished calibration; StatisticsError if it is missing, unfinished or damaged."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        for call in range(manifest["calls"]):
            if not shard_path(folder, call).exists():
                raise StatisticsError(
                    f"{folder}: call {call} of {manifest['calls']} is missing; run the same `ditq calibrate` "
                    "command again, it resumes"
                )
        return cls(folder, manifest)

    @property
    def calls(self) -> int:
        """Number of model calls T."""
        return int(self.manifest["calls"])

    @property
    def timesteps(self) -> list[float]:
        """The scheduler's timestep of each call, noisiest first."""
        return list(self.manifest["timesteps"])

    @property
    def has_attention(self) -> bool:
        """Whether the ranges of Q, K and V were recorded."""
        return bool(self.manifest.get("attention", False))

    def ranges(self, site: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Minimum and maximum of a site, or of an operand of an attention: fp32 [T, K] each."""
        read = [self._read(call, site, "min", "max") for call in range(self.calls)]
        low, high = (torch.stack(side) for side in zip(*read, strict=True))
        self._check_finite(site, low, high)
        return low, high

    def rows(self, site: str) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Sampled input rows of a site, for searches.

        The same (sample, token) pairs for all sites of a call that have as many tokens; under guidance the first half
        is conditional, the second the same pairs of the null half.

        Returns:
            rows: [C, n, K] fp32. calls: the C calls they were sampled at, ascending.

        Raises:
            StatisticsError: none were kept, or a shard is damaged.
        """
        calls = tuple(self.manifest.get("rows", {}).get("calls", ()))
        if not calls:
            raise StatisticsError(
                f"{self.folder}: holds no sampled rows; calibrate into a new folder with --rows 64"
            )
        rows = torch.stack([self._read(call, site, "rows")[0].float() for call in calls])
        self._check_finite(site, rows)
        return rows, calls

    def _read(self, call: int, site: str, *fields: str) -> list[torch.Tensor]:
        path = shard_path(self.folder, call)
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
        if self.manifest["model_hash"] != model_hash(model):
            raise StatisticsError(
                f"{self.folder}: these statistics belong to another model (its weights differ); "
                "calibrate this model into a new folder"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Parse manifest.json; StatisticsError with the cure."""
    path = folder / "manifest.json"
    if not path.exists():
        raise StatisticsError(
            f"{folder}: no manifest.json there; make it with `ditq calibrate MODEL --out {folder}`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StatisticsError(f"{path}: not valid JSON ({error}); calibrate again") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != STATISTICS_VERSION:
        raise StatisticsError(
            f"{path}: version {version!r}, this ditq reads {STATISTICS_VERSION}; calibrate again"
        )
    missing = [key for key in KEYS if key not in manifest]
    if missing:
        raise StatisticsError(f"{path}: lacks {', '.join(missing)}; calibrate again")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Store what the statistics belong to."""
    write_json(folder / "manifest.json", {"version": STATISTICS_VERSION, **manifest})


def remove_state(folder: Path) -> None:
    """Drop the resume point of a finished run."""
    (folder / "state.safetensors").unlink(missing_ok=True)

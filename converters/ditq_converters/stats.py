"""Calibration statistics on disk: one shard per model call, a manifest that says what they belong to.

    stats/manifest.json             plan, sampler, model hash, versions, sites and their widths
    stats/call_0000.safetensors     per site: SITE.min and SITE.max, fp32 [K]; call 0 is the noisiest
    stats/state.safetensors         latents after the last complete call, to resume from; removed at the end

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

from ditq_runtime.files import atomic_file, write_json

STATISTICS_VERSION = 1
KEYS = ("calls", "timesteps", "plan", "sampler", "model_hash")


class StatisticsError(ValueError):
    """Statistics are incomplete, damaged, or belong to another model or plan."""


def model_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shard_path(folder: Path, call: int) -> Path:
    """The file of one call."""
    return folder / f"call_{call:04d}.safetensors"


def write_shard(
    folder: Path, call: int, ranges: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Store site -> (min [K], max [K]) of one complete call."""
    tensors = {}
    for site, (low, high) in ranges.items():
        tensors[f"{site}.min"], tensors[f"{site}.max"] = low.contiguous(), high.contiguous()
    _save(tensors, shard_path(folder, call), {"call": str(call)})


def write_state(folder: Path, call: int, latents: torch.Tensor) -> None:
    """Store the latents [S, C, H, W] that follow call `call`, to resume from."""
    _save({"latents": latents.contiguous()}, folder / "state.safetensors", {"call": str(call)})


def read_state(folder: Path) -> tuple[int, torch.Tensor] | None:
    """Last complete call and the latents after it; None if nothing is there."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return int(file.metadata()["call"]), file.get_tensor("latents")
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

    def ranges(self, site: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Minimum and maximum of a site: fp32 [T, K] each."""
        lows, highs = [], []
        for call in range(self.calls):
            path = shard_path(self.folder, call)
            try:
                with safe_open(path, "pt") as file:
                    lows.append(file.get_tensor(f"{site}.min"))
                    highs.append(file.get_tensor(f"{site}.max"))
            except (SafetensorError, OSError) as error:
                raise StatisticsError(
                    f"{path}: cannot read {site} ({error}); calibrate again"
                ) from error
        low, high = torch.stack(lows), torch.stack(highs)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise StatisticsError(
                f"{self.folder}: {site} holds values that are not finite; calibrate again"
            )
        return low, high

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
        manifest = json.loads(path.read_text())
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

"""Publish a packed folder, with a model card that says what it is and what was measured of it."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ditq_runtime.format.folder import TransformerFolder, open_folder
from ditq_runtime.host.sizes import size_by_category

ACTIVATIONS = {
    "token": "per token",
    "token_asym": "per token with zero points",
    "static": "with calibrated ranges",
}
CARD, GRID = "README.md", "samples.png"


def model_card(path: str | Path, report: dict[str, Any] | None = None, grid: bool = False) -> str:
    """The card of a packed folder, in Markdown.

    Args:
        path: a packed pipeline or transformer folder.
        report: `report.json` of `ditq eval`, parsed; without it the card says that nothing was measured.
        grid: the folder holds `samples.png`, which the card shows.

    Returns:
        Front matter for the hub, then method, sizes, measurements and how to load it.

    Raises:
        CheckpointError: not a folder written by ditq, or a damaged one.
        ValueError: a float model.
    """
    folder = open_folder(path)
    if folder.scheme is None or folder.quantization is None:
        raise ValueError(f"model_card: {path} is a float model, not a packed one")
    made = {k: v for k, v in (folder.quantization.get("recipe") or {}).items() if k != "plan"}
    whole = (Path(path) / "model_index.json").exists()
    title = f"# {folder.scheme.architecture}, {_bits(folder)}"
    picture = [f"![samples]({GRID})", ""] if grid else []
    return "\n".join(
        [
            "---", "library_name: diffusers", "tags: [ditq, quantized]", "---", "", title, "", *picture,
            "Packed by ditq: integer weights and activations, played through diffusers.", "",
            *_loading(whole, folder.scheme.architecture), "",
            "## How it was made", "", *_rows(("setting", "value"), sorted(_flat(made).items())), "",
            "## Size", "", *_rows(("part", "bytes"), _sizes(folder)), "",
            "## Measured", "", *_measured(report), "",
        ]
    )  # fmt: skip


def push_to_hub(
    path: str | Path,
    repo_id: str,
    report: str | Path | None = None,
    grid: str | Path | None = None,
    private: bool | None = None,
    token: str | None = None,
    api: Any = None,
) -> str:
    """Upload a packed folder with its card. The folder itself is not changed.

    Args:
        path: a packed pipeline or transformer folder.
        repo_id: `someone/name`; created if there is none.
        report: `report.json` of `ditq eval`.
        grid: a PNG of samples, as `ditq sample --out` writes it.
        private: of a new repository.
        token: of the hub; None: the stored one.
        api: a `huggingface_hub.HfApi`, or anything with its `create_repo` and `upload_folder`.

    Returns:
        The address of the upload, as the hub gives it.

    Raises:
        CheckpointError: not a folder written by ditq, or a damaged one.
        ValueError: a float model, or a report or picture that cannot be read. Nothing is uploaded then.
    """
    for extra in (report, grid):
        if extra is not None and not Path(extra).is_file():
            raise ValueError(f"push_to_hub: {extra} is not a file")
    parsed = None if report is None else json.loads(Path(report).read_text(encoding="utf-8"))
    card = model_card(path, parsed, grid is not None)
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as work:
        upload = Path(work) / "upload"
        shutil.copytree(path, upload)
        (upload / CARD).write_text(card, encoding="utf-8")
        if grid is not None:
            shutil.copyfile(grid, upload / GRID)
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=created.repo_id, folder_path=str(upload), commit_message="Upload a packed model"
        )
    return str(done)


def _bits(folder: TransformerFolder) -> str:
    assert folder.scheme is not None
    formats = folder.scheme.formats.values()
    kinds = {
        f"{f.weights} weights, int8 activations {ACTIVATIONS[f.activations]}"
        for f in formats
        if f.integer_gemm
    }
    return "; ".join(sorted(kinds)) or "weight-only"


def _loading(whole: bool, architecture: str) -> list[str]:
    kind = "DiffusionPipeline" if whole else architecture
    return [
        "```python",
        f"from diffusers import {kind}",
        "import ditq_runtime  # registers the backend with diffusers",
        "",
        f'model = {kind}.from_pretrained("...")',
        "```",
    ]


def _flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value not in (None, []):
            flat[f"{prefix}{key}"] = value
    return flat


def _sizes(folder: TransformerFolder) -> list[tuple[str, str]]:
    sizes = [(part, size) for part, size in size_by_category(folder).items() if size]
    return [(part, f"{size:,}") for part, size in [*sizes, ("all weight files", folder.nbytes)]]


def _measured(report: dict[str, Any] | None) -> list[str]:
    """The numbers of a report; per-step and per-layer lists are summed up by their mean."""
    if report is None:
        return [
            "Nothing was measured of this upload; `ditq eval` compares it with its float model."
        ]
    found: list[tuple[str, str]] = []
    for key, value in _flat(report).items():
        numbers = value if isinstance(value, list) else [value]
        if all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
            mean = sum(numbers) / len(numbers)
            found.append(
                (f"{key}, mean of {len(numbers)}" if len(numbers) > 1 else key, f"{mean:.6g}")
            )
    return _rows(("figure", "value"), found)


def _rows(head: tuple[str, str], rows: Any) -> list[str]:
    cells = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *cells]

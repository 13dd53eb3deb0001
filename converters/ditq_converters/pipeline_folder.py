"""Write a pipeline folder that stock diffusers loads: complete or not at all, class names included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ditq_runtime.files import atomic_folder

PLAN = Path("ditq") / "plan.json"


def write_pipeline(
    pipe: Any,
    out: Path,
    max_shard_size: str = "10GB",
    labels_of: Any = None,
    plan: str | None = None,
) -> None:
    """Save a pipeline, or a transformer alone, atomically.

    Args:
        pipe: what to save.
        out: the folder; must not exist, or be empty.
        max_shard_size: as in diffusers' `save_pretrained`.
        labels_of: the pipeline whose class names to keep; default: `pipe`.
        plan: text of the plan that it was made by; None for a float model.

    Raises:
        FileExistsError: `out` is in use.
    """
    with atomic_folder(out) as part:
        pipe.save_pretrained(part, max_shard_size=max_shard_size)
        forget_paths(part)
        _keep_labels(labels_of or pipe, part / "model_index.json")
        if plan is not None:
            keep_plan(part, plan)


def keep_plan(folder: Path, plan: str) -> None:
    """Write the plan, with its reasons, beside what it made; nothing reads it to load or to sample."""
    (folder / PLAN).parent.mkdir()
    (folder / PLAN).write_text(plan, encoding="utf-8")


def forget_paths(folder: Path) -> None:
    """Remove what diffusers notes of where each component was loaded from: a path of this machine."""
    for config in sorted(folder.rglob("*.json")):
        content = json.loads(config.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            config.write_text(
                json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )


def _keep_labels(pipe: Any, index: Path) -> None:
    """`save_pretrained` drops id2label; put it back, so that class names survive."""
    names: dict[str, list[str]] = {}
    for label, class_id in getattr(pipe, "labels", {}).items():
        names.setdefault(str(class_id), []).append(label)
    if names:
        content = json.loads(index.read_text(encoding="utf-8"))
        content["id2label"] = {key: ", ".join(names[key]) for key in sorted(names, key=int)}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""Write a pipeline folder that stock diffusers loads: complete or not at all, with what `save_pretrained` drops."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditq_runtime.calls.saved import CALL, saved_call
from ditq_runtime.files import atomic_folder, write_json

PLAN = Path("ditq") / "plan.json"


def write_pipeline(
    pipe: Any,
    out: Path,
    max_shard_size: str = "10GB",
    plans: Mapping[str, str] | None = None,
) -> None:
    """Save a pipeline, or a transformer alone, atomically.

    Args:
        pipe: what to save.
        out: the folder; must not exist, or be empty.
        max_shard_size: as in diffusers' `save_pretrained`.
        plans: component -> text of the plan that it was made by; none for a float model.

    Raises:
        FileExistsError: `out` is in use.
    """
    with atomic_folder(out) as part:
        pipe.save_pretrained(part, max_shard_size=max_shard_size)
        forget_paths(part)
        _keep_labels(pipe, part / "model_index.json")
        keep_plans(part, plans or {})
        call = saved_call(pipe)
        if call:
            (part / CALL).parent.mkdir(exist_ok=True)
            write_json(part / CALL, call)


def keep_plans(folder: Path, plans: Mapping[str, str]) -> None:
    """Write plans, with their reasons, beside what they made; nothing reads them to load or to sample.

    The first is `ditq/plan.json`; that of another transformer has its name, `ditq/plan.transformer_2.json`.
    """
    for number, (component, plan) in enumerate(plans.items()):
        path = folder / (PLAN if number == 0 else PLAN.with_suffix(f".{component}.json"))
        path.parent.mkdir(exist_ok=True)
        path.write_text(plan, encoding="utf-8")


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

"""One page of an output folder: `python -m ditq_bench.gpu_run.summary OUT` writes OUT/summary.md."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from ditq_runtime.files import atomic_file

KERNEL_COLUMNS = (
    "shape",
    "candidate",
    "p20_us",
    "median_us",
    "p80_us",
    "tops",
    "roof",
    "speedup_over_bf16",
)
CPU_COLUMNS = (
    "what",
    "candidate",
    "backend",
    "median_ms",
    "speedup_over_fp32",
    "speedup_over_bf16",
)
MODEL_COLUMNS = ("model", "what", "mode", "warm_up_s", "median_ms", "p20_ms", "p80_ms", "skipped")


def summary(out: Path) -> str:
    """Markdown of whatever stages left behind."""
    parts = ["# GPU run", "", *_stages(out)]
    for questions in filter(None, (_json(path) for path in sorted(out.glob("*.json")))):
        if "questions" not in questions:
            continue
        dry = " Tiny shapes, interpreted: these times mean nothing." if questions["dry_run"] else ""
        parts += ["## Questions", "", f"{', '.join(questions['origin'])}.{dry}", ""]
        for name, question in questions["questions"].items():
            parts += [f"### {name}", "", question["question"].splitlines()[0], ""]
            parts += _table(question.get("answers", []))
            if question["error"]:
                parts += [f"Failed: {question['error']}", ""]
    for path in sorted(out.glob("kernels*/kernels.csv")):
        parts += _file(path, f"## {path.parent.name}", KERNEL_COLUMNS)
    for path in sorted(out.glob("model*/model.csv")):
        parts += _file(path, f"## {path.parent.name}", MODEL_COLUMNS)
    parts += _file(out / "cpu.csv", "## cpu", CPU_COLUMNS)
    for path in sorted(out.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        parts += [f"## {path.stem}", "", *_table(rows)]
    return "\n".join(parts)


def _stages(out: Path) -> list[str]:
    names = ("stage", "status", "seconds", "reason")
    lines = (out / "stages.tsv").read_text(encoding="utf-8").splitlines()
    return _table([dict(zip(names, line.split("\t"), strict=True)) for line in lines])


def _file(path: Path, title: str, columns: tuple[str, ...]) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    first = ", ".join(rows[0][name] for name in ("device", "torch", "triton", "commit"))
    return [title, "", f"{first}.", "", *_table([{c: row[c] for c in columns} for row in rows])]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [_line(columns), _line(["---"] * len(columns))]
    return [*lines, *(_line([_cell(row.get(name, "")) for name in columns]) for row in rows), ""]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main() -> None:
    """Write summary.md."""
    parser = argparse.ArgumentParser(description="summarize an output folder of gpu_run.sh")
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    with atomic_file(out / "summary.md") as part:
        part.write_text(summary(out), encoding="utf-8")


if __name__ == "__main__":
    main()

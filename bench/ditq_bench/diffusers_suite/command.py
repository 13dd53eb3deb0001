"""Run diffusers' own tests of models, quantizers and LoRA against quantized models, and count.

    DIFFUSERS_SOURCE=/path/to/diffusers python -m ditq_bench.diffusers_suite

DIFFUSERS_SOURCE is a source tree of diffusers with its `tests`; the package that is tested against is the one that is
installed. Nothing of theirs is in this repository.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from ditq_bench.diffusers_suite.plugin import RESULTS
from ditq_runtime.cli.output import print_table, say

SOURCE = "DIFFUSERS_SOURCE"
MISSING = (
    f"{SOURCE} names no source tree of diffusers with tests/models/testing_utils, so that its tests are left out; "
    "set it to a checkout"
)
FILES = tuple(
    f"tests/models/transformers/test_models_{name}.py"
    for name in (
        "dit_transformer2d", "pixart_transformer2d", "transformer_sd3", "transformer_flux",
    )
)  # fmt: skip
OURS = Path(__file__).with_name("quantizer.py")
NO = "not applicable: "
COLUMNS = ("passed", "failed", "not applicable", "skipped")


def source() -> Path | None:
    """The tree that the environment names; None if it names none."""
    path = Path(os.environ.get(SOURCE, ""))
    return path if SOURCE in os.environ and (path / "tests/models/testing_utils").is_dir() else None


def run(tree: Path, chosen: str = "") -> dict[str, tuple[str, str]]:
    """Run the tests in a process of their own.

    Args:
        tree: diffusers' source.
        chosen: as `-k` of pytest.

    Returns:
        Test -> its outcome, and why where it did not pass.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        environment = os.environ | {
            RESULTS: str(results), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        options = ["-p", "ditq_bench.diffusers_suite.plugin", "-p", "no:cacheprovider", "-q", "-c"]
        line = [*options, "pyproject.toml", "--rootdir", ".", "-k", chosen, *FILES, str(OURS)]
        subprocess.run(
            [sys.executable, "-m", "pytest", *line], cwd=tree, env=environment, check=False
        )
        found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    return {test: (outcome, why) for test, (outcome, why) in found.items()}


def kind_of(outcome: str, why: str) -> str:
    """One of `COLUMNS`."""
    return "not applicable" if why.startswith(NO) else outcome


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0 if no test that applies failed."""
    parser = argparse.ArgumentParser(description="diffusers' own tests against quantized models.")
    parser.add_argument("-k", dest="chosen", default="", help="as of pytest")
    parser.add_argument("--csv", type=Path, help="write every test with its outcome")
    options = parser.parse_args(arguments)
    tree = source()
    if tree is None:
        say(MISSING)
        return 0
    outcomes = run(tree, options.chosen)
    counts: dict[str, Counter[str]] = {}
    for test, (outcome, why) in outcomes.items():
        group = test.split("::")[1].removeprefix("Test")
        counts.setdefault(group, Counter())[kind_of(outcome, why)] += 1
    rows = [(group, *(found[key] for key in COLUMNS)) for group, found in counts.items()]
    rows.append(("all", *(sum(found[key] for found in counts.values()) for key in COLUMNS)))
    print_table("diffusers' own tests, quantized", ("class", *COLUMNS), rows)
    for test, (outcome, why) in outcomes.items():
        if outcome == "failed":
            say(f"{test}: {why}")
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("test", "outcome", "why"))
            for test, (outcome, why) in sorted(outcomes.items()):
                writer.writerow((test.split("/")[-1], kind_of(outcome, why), why.removeprefix(NO)))
    return 1 if not outcomes or any(outcome == "failed" for outcome, _ in outcomes.values()) else 0

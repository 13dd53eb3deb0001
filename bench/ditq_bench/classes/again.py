"""A new process: load what the sweep stored, compute the same bits, prove the integers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

from ditq_bench.classes.row import numbered, relative, told
from ditq_bench.classes.subject import judged, run_all
from ditq_bench.classes.sweep import OUTPUT_FILE, STATS
from ditq_bench.zoo import CLASSES, quiet
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_runtime import execution_report


def check_again(folder: Path) -> dict[str, dict[str, str]]:
    """Run this file in a new process.

    Args:
        folder: FOLDER/CLASS/RECIPE holds a checkpoint and the output of a forward.

    Returns:
        class -> recipe -> what went wrong, empty where nothing did.
    """
    command = [sys.executable, "-m", "ditq_bench.classes.again", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"classes: the new process failed: {done.stderr[-2000:]}")
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def problem(name: str, checkpoint: Path) -> str:
    """What is wrong with one checkpoint; empty if nothing is."""
    try:
        with quiet(), torch.compiler.set_stance("force_eager"):
            model = aligned(getattr(diffusers, name).from_pretrained(checkpoint))
            stats = CalibrationStats.open(checkpoint.with_name(STATS))
            calls = judged(stats, CLASSES[name], model)
            got, stored = numbered(run_all(model, calls)), load_file(checkpoint / OUTPUT_FILE)
            if not all(torch.equal(got[key], stored[key]) for key in stored):
                apart = relative(list(got.values()), list(stored.values()))
                return f"other bits than before it was saved ({apart:.0e} apart)"
            execution_report(model, calls[0])
    except Exception as error:
        return told(error)
    return ""


def aligned(model: Any) -> Any:
    """A loaded model with its tensors copied: a file may lay them at other addresses, where BLAS sums otherwise."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def main(folder: Path) -> None:
    """Check every checkpoint; one line of JSON."""
    found: dict[str, dict[str, str]] = {}
    for output in sorted(folder.glob(f"*/*/{OUTPUT_FILE}")):
        recipe = output.parent
        found.setdefault(recipe.parent.name, {})[recipe.name] = problem(recipe.parent.name, recipe)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

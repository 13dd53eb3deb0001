"""The reader of checkpoints knows bytes and schemes; modules, families and diffusers are above it."""

import ast
from pathlib import Path

import ditq_runtime

HOME = Path(ditq_runtime.__file__).parent / "format"
BELOW = ("ditq_runtime.format", "ditq_runtime.errors", "ditq_runtime.files", "ditq_kernels")


def test_the_format_imports_nothing_above_it():
    wrong = []
    for path in HOME.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            ours = [n for n in names if n.startswith(("ditq_", "diffusers", "accelerate"))]
            wrong += [(path.name, n) for n in ours if not n.startswith(BELOW)]
    assert len(list(HOME.glob("*.py"))) > 8
    assert wrong == []

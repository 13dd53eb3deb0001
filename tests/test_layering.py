"""Imports point one way, rooms are not packages, and importing is free: no GPU, no network, no kernels' Triton."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOM_OF = {  # package -> its room, leftmost first: each may import only those that follow it
    "ditq_bench": "bench",
    "ditq_converters": "converters",
    "ditq_runtime": ".",
    "ditq_kernels": "kernels",
}
ORDER = list(ROOM_OF)
WINGS = {  # of a package, from the front door to the cellar: each imports only those below it
    "ditq_converters": (
        "cli", "showcase", "auto", "evaluate", "convert", "plan", "calibrate", "sites", "methods", "models",
        "streaming", "demo", "pages",
    ),
    "ditq_runtime": (
        "cli", "speed", "host", "report", "lora", "calls", "families", "attention", "layers", "format",
    ),
}  # fmt: skip


def sources(package):
    return sorted((ROOT / ROOM_OF[package] / package).rglob("*.py"))


def imports(path):
    """(module, relative level) of every import statement in a file, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level))
            found += [(f"{node.module}.{alias.name}", node.level) for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            texts = [
                part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)
            ]
            found += [(str(text), 0) for text in texts[:1]]
    return found


@pytest.mark.parametrize("package", ["ditq_converters", "ditq_runtime", "ditq_kernels"])
def test_the_packages_are_where_this_test_looks(package):
    assert len(sources(package)) > 5


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package):
    left = ORDER[: ORDER.index(package)]
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in sources(package)
        for module, _ in imports(path)
        if module.split(".")[0] in left
    ]
    assert wrong == []


def test_this_test_sees_a_wrong_import(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(
        "def f():\n    from ditq_bench.x import y\n    import a.b\n    from . import c\n"
    )
    assert imports(path) == [
        ("ditq_bench.x", 0), ("ditq_bench.x.y", 0), ("a.b", 0), ("", 1), ("None.c", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("package", WINGS)
def test_the_wings_of_a_package_import_one_way(package):
    root, order = ROOT / ROOM_OF[package] / package, WINGS[package]
    wings = [path.name for path in root.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    assert sorted(wings) == sorted(order)
    shared = [path.stem for path in root.glob("*.py") if not path.stem.startswith("__")]
    for path in sources(package):
        here = path.relative_to(root).parts[0].removesuffix(".py")
        if here.startswith("__"):  # what the package shows, by lazy names, and its front door
            continue
        below = [*(order[order.index(here) :] if here in order else ()), *shared]
        wrong = [
            module
            for module, _ in imports(path)
            if module.startswith(f"{package}.") and module.split(".")[1] not in below
        ]
        assert wrong == [], path


@pytest.mark.parametrize("package", ORDER)
def test_triton_is_imported_only_by_the_kernels(package):
    home = ROOT / "kernels" / "ditq_kernels" / "_triton"
    users = {
        path
        for path in sources(package)
        for module, _ in imports(path)
        if module.split(".")[0] == "triton"
    }
    assert all(path.is_relative_to(home) for path in users), users
    assert bool(users) == (package == "ditq_kernels")


@pytest.mark.parametrize("package", ORDER)
def test_imports_are_absolute(package):
    relative = [str(path) for path in sources(package) if any(level for _, level in imports(path))]
    assert relative == []


@pytest.mark.parametrize("room", ["kernels", "converters", "bench"])
def test_rooms_are_not_packages(room):
    """A package named `kernels` would shadow Hugging Face's, which diffusers imports."""
    assert (ROOT / room).is_dir()
    assert not (ROOT / room / "__init__.py").exists()


def test_no_command_is_registered_by_a_package_to_its_left():
    """Each entry point names a function of the package whose room it stands in."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = {
        **project["scripts"],
        **project["entry-points"]["ditq.commands"],
    }
    assert {"ditq", "inspect", "calibrate", "convert", "demo", "sample", "doctor"} <= set(targets)
    for name, target in targets.items():
        module, _, function = target.partition(":")
        package = module.split(".")[0]
        path = (ROOT / ROOM_OF[package]).joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert path.exists(), f"{name}: {path} is missing"
        defined = {
            part.name if isinstance(part, ast.FunctionDef) else target.id
            for part in ast.parse(path.read_text()).body
            if isinstance(part, (ast.FunctionDef, ast.Assign))
            for target in (part.targets if isinstance(part, ast.Assign) else [part])
            if isinstance(part, ast.FunctionDef) or isinstance(target, ast.Name)
        }
        assert function in defined, f"{name}: {module} defines no {function}"


PROBE = """
import socket, sys
used = []
def refuse(name):
    def refused(*args, **kwargs):
        used.append((name, *args[-1:]))
        raise OSError("no network in this test")
    return refused
class Refused(socket.socket):
    connect, connect_ex, sendto = refuse("connect"), refuse("connect_ex"), refuse("sendto")
    if {alone}:
        __init__ = refuse("socket")
socket.socket = Refused
socket.getaddrinfo = refuse("getaddrinfo")
import {package}
import torch
assert used == [], used
assert not torch.cuda.is_initialized()
ours = [name for name in sys.modules if name.startswith("ditq_kernels._triton")]
assert ours == [], ours
if {alone}:
    for name in ("triton", "diffusers", "matplotlib"):
        assert name not in sys.modules, name
import logging
assert logging.getLogger().handlers == [], "logging was set up"
print("free")
"""


@pytest.mark.parametrize(
    ("package", "alone"),
    [("ditq_kernels", True), ("ditq_runtime", False), ("ditq_converters", False)],
)
def test_importing_is_free(package, alone):
    """No connection, no name look-up, no CUDA, no kernel. Only `ditq_kernels` can promise no socket and no Triton
    at all: diffusers makes torch look for Triton, and its urllib3 binds a local socket to see whether IPv6 exists."""
    rooms = [str(ROOT / room) for room in dict.fromkeys(ROOM_OF.values())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(rooms)}
    probe = subprocess.run(
        [sys.executable, "-c", PROBE.format(package=package, alone=alone)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert probe.stdout == "free\n", probe.stderr

"""`ditq doctor`: versions, devices, and which backend each op uses here and why."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from ditq_runtime.cli.output import print_json, print_table, say

PACKAGES = ("ditq", "torch", "triton", "diffusers", "accelerate", "safetensors", "numpy")


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices and the backend of every op.

    Example: ditq doctor --json
    """
    report = examine()
    if json:
        print_json(report)
        return
    print_table("versions", ("package", "version"), report["versions"].items())
    for device in report["devices"]:
        say(f"device {device['device']}: {device['name']}")
        rows = [(op, backend) for op, backend, _ in device["ops"]]
        print_table(f"ops on {device['device']}", ("op", "backend"), rows)
        for backend, why in dict.fromkeys((backend, why) for _, backend, why in device["ops"]):
            say(f"{backend}: {why}")


def examine() -> dict[str, Any]:
    """Everything `doctor` shows, JSON-safe."""
    import torch

    from ditq_kernels.launch import cpu_features, gpus

    devices = [_device("cpu", cpu_features.describe())]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        device = f"cuda:{index}"
        name = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
        devices.append(_device(device, name, gpus.why_device_refused(torch.device(device))))
    versions = {name: _version(name) for name in PACKAGES}
    versions["torch"] = torch.__version__  # names its build too, which the package index leaves out
    return {
        "python": platform.python_version(),
        "versions": versions,
        "devices": devices,
    }


def _device(device: str, name: str, refused: str = "") -> dict[str, Any]:
    import torch

    import ditq_kernels as k
    from ditq_kernels.launch.backend import TORCH_OPS, TRITON_OPS

    rows = []
    for op in sorted(TRITON_OPS | TORCH_OPS):
        try:
            backend = k.backend_of(op, torch.device(device))
            why = WHY[backend]
            if backend == "triton" and refused:
                backend, why = "unavailable", refused
        except (RuntimeError, ImportError) as error:
            backend, why = "unavailable", str(error)
        rows.append((op, backend, why))
    return {"device": device, "name": name, "ops": rows}


WHY = {
    "reference": "plain torch, exact integers; no GPU here",
    "cpu": "torch's int8 GEMMs, same integers as the reference",
    "triton": "Triton kernel, compiled on first use",
    "torch": "plain torch on the GPU",
}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

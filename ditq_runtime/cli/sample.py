"""`ditq sample`: images from a packed folder, with their latency and the proof of what ran."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ditq_runtime.calls.schedulers import SAMPLERS, set_sampler
from ditq_runtime.cli.device import place
from ditq_runtime.cli.images import grid
from ditq_runtime.cli.last_inputs import LastInputs
from ditq_runtime.cli.output import print_json, say
from ditq_runtime.cli.wishes import Sizes, draw, wishes
from ditq_runtime.files import atomic_file, check_file

DTYPES = ("float32", "bfloat16", "float16")


def sample(
    path: Annotated[
        str, typer.Argument(help="A pipeline folder written by `ditq convert`, or a hub id.")
    ],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("sample.png"),
    class_labels: Annotated[
        str, typer.Option(help="Class ids or names, comma-separated; for DiT.")
    ] = "",
    prompt: Annotated[
        list[str], typer.Option(help="Text to draw, for text pipelines; repeatable.")
    ] = [],  # noqa: B006  typer needs a list default and does not mutate it
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line, for text pipelines.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Denoising steps; default: 50, or the text pipeline's own."),
    ] = None,
    cfg: Annotated[
        float | None,
        typer.Option(
            help="Guidance weight, off at 1 or less; default: 1.5, or the text pipeline's own."
        ),
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=8, help="Pixels, for text pipelines; default: their own.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=8, help="Pixels, for text pipelines; default: their own.")
    ] = None,
    sampler: Annotated[
        str, typer.Option(help=f"{', '.join(SAMPLERS)}; default: the pipeline's scheduler.")
    ] = "",
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first image; image i uses seed + i.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward.")] = 16,
    columns: Annotated[int, typer.Option(min=1, help="Images per row of the grid.")] = 8,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1; default: cuda where there is one.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backend: Annotated[
        str, typer.Option(help="auto, reference, or insist on cpu or triton.")
    ] = "auto",
    cuda_graph: Annotated[
        bool,
        typer.Option(
            "--cuda-graph", help="Warm up, compute modulation once, replay one CUDA graph a step."
        ),
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Print the execution report.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Sample images and write them as one grid.

    Example: ditq sample out --class-labels 0,1,2,3 --steps 50 --out digits.png --report

    Example: ditq sample out --prompt "a red fox in the snow" --prompt "two boats" --out grid.png
    """
    import torch

    check_file(out, (".png",))
    here = place(device)
    used = _check(here, dtype, backend, cuda_graph)
    begin = time.perf_counter()
    pipe = _opened(path, getattr(torch, dtype), here, sampler, cuda_graph)
    loaded = time.perf_counter() - begin
    wanted = wishes(pipe, class_labels, prompt, prompts, Sizes(steps, cfg, height, width))
    torch.manual_seed(seed)  # diffusers gives a sampler that draws noise at every step no generator
    begin = time.perf_counter()
    with LastInputs(pipe.transformer) as last:
        images = draw(pipe, wanted, seed, batch)
    took = time.perf_counter() - begin
    with atomic_file(out) as part:
        grid(images, min(columns, len(images))).save(part, format="PNG")
    proof = _proof(pipe, last) if report else None
    result: dict[str, Any] = {
        "out": str(out),
        "images": len(images),
        "steps": wanted.options["num_inference_steps"],
        "load_seconds": loaded,
        "seconds": took,
        "seconds_per_image": took / len(images),
        "device": str(here),
        "backend": used,
        "dtype": dtype,
    }
    if json:
        print_json(result if proof is None else result | {"report": proof.to_dict()})
    else:
        _tell(result, proof)


def _check(here: Any, dtype: str, backend: str, cuda_graph: bool) -> str:
    """The backend of the GEMMs there; typer.BadParameter or ValueError for what cannot be."""
    from ditq_kernels.launch.backend import CHOICES

    for option, value, choices in (("dtype", dtype, DTYPES), ("backend", backend, CHOICES)):
        if value not in choices:
            raise typer.BadParameter(
                f"--{option} must be one of {', '.join(choices)}, got {value!r}."
            )
    used = check_backend(backend, here)
    if cuda_graph and here.type != "cuda":
        raise ValueError(f"--cuda-graph needs a CUDA GPU, and this runs on {here}; leave it out")
    return used


def _opened(path: str, dtype: Any, here: Any, sampler: str, cuda_graph: bool) -> Any:
    """The pipeline, with the scheduler that was asked for, captured if that was."""
    from ditq_runtime.speed.prepare import prepare

    pipe = load(path, dtype, here)
    set_sampler(pipe, sampler)
    if cuda_graph:
        prepare(pipe, cuda_graph=True)
    return pipe


def _proof(pipe: Any, last: LastInputs) -> Any:
    from ditq_runtime.report.execution import execution_report

    return execution_report(pipe.transformer, last.inputs)


def _tell(result: dict[str, Any], proof: Any) -> None:
    if proof is not None:
        say(str(proof))
    say(
        "{out}: {images} images, {steps} steps, {seconds:.2f} s ({seconds_per_image:.3f} s per image) on {device} "
        "({backend}, {dtype}); loaded in {load_seconds:.2f} s".format(**result)
    )


def load(path: str, dtype: Any, device: Any) -> Any:
    """Open a packed pipeline the way any diffusers user does, after checking that it is one."""
    from diffusers import DiffusionPipeline

    import ditq_runtime  # noqa: F401  registers the backend
    from ditq_runtime.format.folder import open_folder
    from ditq_runtime.host.hub_cache import local

    if path.startswith("demo:"):
        raise ValueError(
            f"{path} is a built-in float model, not a packed folder; `ditq convert {path} OUT` makes one"
        )
    path = local(path)
    folder = open_folder(path)
    if folder.scheme is None:
        raise ValueError(
            f"{path}: a float model, not a packed one; `ditq convert {path} OUT` makes one"
        )
    if folder.path == Path(path):
        raise ValueError(
            f"{path}: a transformer alone cannot sample; give a pipeline folder with model_index.json"
        )
    pipe = DiffusionPipeline.from_pretrained(path, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=None)
    return pipe


def check_backend(backend: str, device: Any) -> str:
    """Choose the backend of the linears on a device; ValueError if it cannot run there. Returns that of the GEMMs."""
    import ditq_kernels as k
    from ditq_kernels.launch.backend import why_not

    reason = why_not(backend, device)
    if reason:
        raise ValueError(f"--backend: {reason}")
    k.choose_backend(backend, device)
    return k.backend_of("gemm_w8a8", device)

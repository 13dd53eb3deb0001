"""`ditq sample`: images from a packed folder, with their latency and the proof of what ran."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from ditq_runtime.calls.schedulers import SAMPLERS
from ditq_runtime.cli.device import place
from ditq_runtime.cli.last_inputs import LastInputs
from ditq_runtime.cli.opening import DTYPES, OFFLOADS, open_packed
from ditq_runtime.cli.output import print_json, say
from ditq_runtime.cli.progress import told_steps

PathArgument = Annotated[
    str, typer.Argument(metavar="PACKED", help="A folder written by `ditq convert`, or a hub id.")
]
OutOption = Annotated[
    Path,
    typer.Option(
        help="A .png of all images, a .safetensors of the latents, or a folder with a file per call."
    ),
]
InputsOption = Annotated[
    Path | None,
    typer.Option(
        help="What to call the pipeline with: .jsonl with one call's arguments per line (paths for images), or "
        ".safetensors of embeddings."
    ),
]
ClassLabelsOption = Annotated[
    str, typer.Option(help="Class ids or names, comma-separated; for DiT.")
]
PromptOption = Annotated[
    list[str], typer.Option(help="Text to draw, for text pipelines; repeatable.")
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="Text file with one prompt per line, for text pipelines.")
]
StepsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Denoising steps; default: 50, or the text pipeline's own."),
]
CfgOption = Annotated[
    float | None,
    typer.Option(
        help="Guidance weight, off at 1 or less; default: 1.5, or the text pipeline's own."
    ),
]
HeightOption = Annotated[
    int | None, typer.Option(min=8, help="Pixels, for text pipelines; default: their own.")
]
WidthOption = Annotated[
    int | None, typer.Option(min=8, help="Pixels, for text pipelines; default: their own.")
]
SamplerOption = Annotated[
    str, typer.Option(help=f"{', '.join(SAMPLERS)}; default: the pipeline's scheduler.")
]
SeedOption = Annotated[
    int, typer.Option(min=0, help="Seed of the first image; image i uses seed + i.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Images per forward.")]
ColumnsOption = Annotated[int, typer.Option(min=1, help="Images per row of the grid.")]
DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1; default: cuda where there is one.")
]
DtypeOption = Annotated[
    str,
    typer.Option(help="float32, bfloat16 or float16, of what is float; default: as stored."),
]
OffloadOption = Annotated[
    str,
    typer.Option(
        help="none; model: one model of the pipeline at a time on the GPU; layer: one layer, slow."
    ),
]
BackendOption = Annotated[str, typer.Option(help="auto, reference, or insist on cpu or triton.")]
CudaGraphOption = Annotated[
    bool,
    typer.Option(
        "--cuda-graph", help="Warm up, compute modulation once, replay one CUDA graph a step."
    ),
]
ReportOption = Annotated[bool, typer.Option("--report", help="Print the execution report.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def sample(
    path: PathArgument,
    out: OutOption = Path("sample.png"),
    inputs: InputsOption = None,
    class_labels: ClassLabelsOption = "",
    prompt: PromptOption = [],  # noqa: B006  typer needs a list default and does not mutate it
    prompts: PromptsOption = None,
    steps: StepsOption = None,
    cfg: CfgOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    sampler: SamplerOption = "",
    seed: SeedOption = 0,
    batch: BatchOption = 16,
    columns: ColumnsOption = 8,
    device: DeviceOption = "",
    dtype: DtypeOption = "",
    offload: OffloadOption = "none",
    backend: BackendOption = "auto",
    cuda_graph: CudaGraphOption = False,
    report: ReportOption = False,
    json: JsonOption = False,
) -> None:
    """Sample images and write them as one grid, or a file per call.

    A transformer alone takes embeddings, and gives latents. A folder is shared by processes that torchrun or accelerate
    started, and a killed run goes on there.

    Example: ditq sample out --class-labels 0,1,2,3 --steps 50 --out digits.png --report

    Example: ditq sample out --prompt "a red fox in the snow" --prompt "two boats" --out grid.png
    """
    from ditq_runtime.cli.drawing import check_out
    from ditq_runtime.cli.wishes import Sizes, wished
    from ditq_runtime.speed.prepare import prepare

    if inputs is not None and (class_labels or prompt or prompts):
        raise typer.BadParameter("--inputs says what to draw already; leave the other form out.")
    check_out(out)
    here = place(device)
    used = _check(here, dtype, backend, offload, cuda_graph)
    begin = time.perf_counter()
    pipe = open_packed(path, dtype, here, offload)
    if cuda_graph:
        prepare(pipe, cuda_graph=True)
    dtype = str(pipe.dtype).removeprefix("torch.")
    loaded = time.perf_counter() - begin
    sizes = Sizes(steps, cfg, height, width)
    given = wished(pipe, inputs, class_labels, prompt, prompts, sizes, seed, batch)
    begin = time.perf_counter()
    work = {"model": path, "dtype": dtype, "sampler": sampler}
    images, listened = _draw(pipe, given, out, columns, work)
    took = time.perf_counter() - begin
    proofs = [last.report() for last in listened if last.ran] if report else []
    result: dict[str, Any] = {
        "out": str(out),
        "images": images,
        "steps": given[0].steps(pipe),
        "load_seconds": loaded,
        "seconds": took,
        "seconds_per_image": took / max(images, 1),
        "device": str(here),
        "backend": used,
        "dtype": dtype,
    }
    if json:
        names = ("report", *(f"report_{i}" for i in range(2, len(proofs) + 1)))
        print_json(result | {n: p.to_dict() for n, p in zip(names, proofs, strict=False)})
    else:
        _tell(result, proofs)


def _draw(
    pipe: Any, given: list[Any], out: Path, columns: int, work: dict[str, str]
) -> tuple[int, list[LastInputs]]:
    """Draw what is wished and write it; the number of images, and the last call of each transformer."""
    from ditq_runtime.calls.parts import transformers_in
    from ditq_runtime.calls.pipeline import ready
    from ditq_runtime.cli.drawing import write_all

    with ExitStack() as stack:
        listening = [LastInputs(m) for m in transformers_in(pipe).values()]
        for last in listening:
            stack.enter_context(last)
        stack.enter_context(ready(pipe, work["sampler"]))
        stack.enter_context(told_steps(pipe, sum(one.steps(pipe) or 0 for one in given)))
        images = write_all(out, pipe, given, columns, work)
    return images, listening


def _check(here: Any, dtype: str, backend: str, offload: str, cuda_graph: bool) -> str:
    """The backend of the GEMMs there; typer.BadParameter or ValueError for what cannot be."""
    from ditq_kernels.launch.backend import CHOICES

    for option, value, choices in (
        ("dtype", dtype or DTYPES[0], DTYPES),
        ("backend", backend, CHOICES),
        ("offload", offload, OFFLOADS),
    ):
        if value not in choices:
            raise typer.BadParameter(
                f"--{option} must be one of {', '.join(choices)}, got {value!r}."
            )
    used = check_backend(backend, here)
    if cuda_graph and here.type != "cuda":
        raise ValueError(f"--cuda-graph needs a CUDA GPU, and this runs on {here}; leave it out")
    if offload != "none" and here.type != "cuda":
        raise ValueError(
            f"--offload {offload} frees a CUDA GPU, and this runs on {here}; leave it out"
        )
    if offload != "none" and cuda_graph:
        raise ValueError("--cuda-graph keeps the model on the GPU; leave --offload out")
    return used


def _tell(result: dict[str, Any], proofs: list[Any]) -> None:
    for proof in proofs:
        say(str(proof))
    say(
        "{out}: {images} images, {steps} steps, {seconds:.2f} s ({seconds_per_image:.3f} s per image) on {device} "
        "({backend}, {dtype}); loaded in {load_seconds:.2f} s".format(**result)
    )


def check_backend(backend: str, device: Any) -> str:
    """Choose the backend of the linears on a device; ValueError if it cannot run there. Returns that of the GEMMs."""
    import ditq_kernels as k
    from ditq_kernels.launch.backend import why_not

    reason = why_not(backend, device)
    if reason:
        raise ValueError(f"--backend: {reason}")
    k.choose_backend(backend, device)
    return k.backend_of("gemm_w8a8", device)

"""`ditq eval`: packed folders against the float model it was made from; figures, plots, a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditq_converters.cli import options as o
from ditq_runtime.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from ditq_converters.evaluate import Evaluation, EvaluationSettings


PackedArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="OUT...",
        help="Folders written by `ditq convert`, or hub ids; several stand side by side.",
    ),
]
ReferenceOption = Annotated[
    str, typer.Option(metavar="MODEL", help="The float model it was made from, as for convert.")
]
ReportOption = Annotated[
    Path, typer.Option(metavar="REPORT", help="Folder for the report; new or empty.")
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Classes or prompts to draw; default: 50 classes, all prompts. Frechet distances need many.",
    ),
]
FewOption = Annotated[int, typer.Option(min=1, help="Of those, for forced SQNR and layers.")]
FeaturesOption = Annotated[
    str, typer.Option(metavar="MODULE:FUNCTION", help="Features for one more Frechet distance.")
]
LpipsOption = Annotated[bool, typer.Option("--lpips", help="Also LPIPS (torchmetrics).")]
FidOption = Annotated[
    bool,
    typer.Option(
        "--fid", help="Also FD, sFD, IS, precision, recall on Inception features (torch-fidelity)."
    ),
]
NpzOption = Annotated[
    Path | None, typer.Option(help="Also write the packed model's samples for ADM's evaluator.")
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="At most 10 steps and 10 samples; rougher figures.")
]


def evaluate_command(
    packed: PackedArgument,
    reference: ReferenceOption,
    out: ReportOption,
    inputs: o.InputsOption = None,
    prompts: o.PromptsOption = None,
    samples: SamplesOption = None,
    few_samples: FewOption = 16,
    steps: o.CallsOption = None,
    cfg: o.CfgOption = None,
    height: o.HeightOption = None,
    width: o.WidthOption = None,
    seed: o.SeedOption = 1,
    batch: o.BatchOption = None,
    sampler: o.SamplerOption = "",
    features: FeaturesOption = "",
    lpips: LpipsOption = False,
    fid: FidOption = False,
    npz: NpzOption = None,
    quick: QuickOption = False,
    device: o.DeviceOption = "",
    json: o.JsonOption = False,
) -> None:
    """Measure what packing cost: SQNR per step and per layer, images, distances, true bytes.

    All models draw the same --inputs, prompts or classes from equal noise. Ends with a folder to look at: open
    REPORT/index.html.

    Example: ditq eval out --reference demo:digits --out report

    Example: ditq eval out-w8 out-w4 --reference demo:digits --out report
    """
    from ditq_converters.evaluate import EvaluationSettings
    from ditq_runtime.calls.schedulers import SAMPLERS
    from ditq_runtime.calls.sharing import world

    if sampler and sampler not in SAMPLERS:
        raise typer.BadParameter(
            f"--sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}."
        )
    if inputs is not None and prompts is not None:
        raise typer.BadParameter("--inputs and --prompts say the same in two ways; give one.")
    if len(packed) > 1 and world() > 1:
        raise typer.BadParameter("processes share the inputs of one packed model; give one folder.")
    if npz is not None and len(packed) > 1:
        raise typer.BadParameter("--npz takes the samples of one packed model; give one folder.")
    settings = EvaluationSettings(
        steps, samples, few_samples, cfg, seed, batch or 32, sampler or None, features, lpips, fid
    )
    settings = settings.quick() if quick else settings
    drawn = {"inputs": inputs, "prompts": prompts, **o.sizes(height, width)}
    found = _run(packed, reference, out, settings, drawn, npz, device)
    if json:
        figures = {name: one.figures for name, one in found.items()}
        print_json(figures if len(found) > 1 else next(iter(figures.values())))
        return
    _print(found, f"{', '.join(packed)} against {reference}", out)


def _print(found: dict[str, Evaluation], title: str, out: Path) -> None:
    from ditq_converters.evaluate.several import compared

    columns = tuple(found) if len(found) > 1 else ("value",)
    print_table(title, ("measure", *columns), compared(found))
    notes = dict.fromkeys(note for one in found.values() for note in one.figures["notes"])
    for note in notes:
        say(f"note: {note}")
    seconds = sum(one.figures["seconds"] for one in found.values())
    say(
        f"{out / 'index.html'}: open it in a browser; {seconds:.0f} s, figures in {out / 'report.json'}"
    )


def _run(
    packed: list[str],
    reference: str,
    out: Path,
    settings: EvaluationSettings,
    drawn: dict[str, Any],
    npz: Path | None,
    device: str,
) -> dict[str, Evaluation]:
    """Open the models, evaluate, and write the samples where asked to."""
    from ditq_converters.evaluate import evaluate
    from ditq_converters.evaluate.inputs import check_packed, judge_pipe, open_packed
    from ditq_converters.evaluate.parts import check_out
    from ditq_converters.evaluate.scores import NO_IMAGES
    from ditq_converters.evaluate.several import evaluate_each, names_of
    from ditq_converters.models.open import open_model

    def opened(path: str) -> Any:
        pipe = open_packed(path)
        o.place(pipe, device)
        return pipe

    check_out(out)
    folders = {name: check_packed(path) for name, path in names_of(packed).items()}
    if len(folders) > 1:
        float_pipe = open_model(reference)
        o.place(float_pipe, device)
        return evaluate_each(folders, opened, float_pipe, settings, out, **drawn)
    (name, folder), *_ = folders.items()
    packed_pipe, float_pipe = open_packed(folder), open_model(reference)
    if npz is not None and getattr(judge_pipe(packed_pipe, float_pipe), "vae", None) is None:
        raise ValueError(f"--npz: there will be no images, because {NO_IMAGES}")
    for pipe in (packed_pipe, float_pipe):
        o.place(pipe, device)
    found = evaluate(packed_pipe, float_pipe, settings, out, packed_folder=folder, **drawn)
    if npz is not None and found.images is not None:
        from ditq_converters.evaluate.report import write_npz

        write_npz(npz, found.images["packed"])
    return {name: found}

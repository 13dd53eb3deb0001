"""Calibrate, convert, reload, sample, compare, show. Reads in the order it runs."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ditq_converters.calibrate.run import calibrate
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.story import convert
from ditq_converters.demo import export_demo
from ditq_converters.evaluate import compare_runs, forced_sqnr, layer_errors, run
from ditq_converters.evaluate.layer_error import CASCADE
from ditq_converters.evaluate.paired import pooled_psnr_db
from ditq_converters.evaluate.scores import score_digits
from ditq_converters.pages.origin import versions
from ditq_converters.progress import progress_bar
from ditq_converters.showcase.asking import asked_for, digits
from ditq_converters.showcase.records import Settings, Study
from ditq_converters.showcase.score import Baseline
from ditq_converters.showcase.variants import DIGITS, FED_BACK, FLOW, NO_DATA, SALIENT, Variant
from ditq_runtime.calls.parts import transformers_in
from ditq_runtime.calls.saved import saved_call
from ditq_runtime.files import check_ours, write_json
from ditq_runtime.format.folder import open_folder
from ditq_runtime.host.sizes import size_by_category
from ditq_runtime.report.execution import execution_report

MARK = "demo.json"  # its settings: the first file of a run, by which the next one knows the folder


def run_showcase(out: Path, settings: Settings) -> dict[str, Any]:
    """Run the main job on the demo models and write a report folder.

    Args:
        out: folder for models, statistics, images, plots, report.json and index.html: a new one, or that of an
            earlier run, whose models are replaced.
        settings: how much of everything.

    Returns:
        The content of report.json.

    Raises:
        ValueError: `out` holds something else.
    """
    from ditq_converters.showcase.page import write_report_page
    from ditq_converters.showcase.pictures import write_pictures

    begin = time.perf_counter()
    check_ours(out, MARK)
    write_json(out / MARK, asdict(settings))
    studies = {
        "digits": _study("demo:digits", DIGITS, out, settings, settings.scored_samples),
        "salient": _study("demo:digits-salient", SALIENT, out, settings, settings.salient_samples),
        "flow": _study("demo:digits-flow", FLOW, out, settings, settings.flow_samples),
        "flow_salient": _study(
            "demo:digits-flow-salient", FLOW, out, settings, settings.flow_salient_samples
        ),
    }
    figures = {name: study.figures for name, study in studies.items()}
    report = {
        "settings": asdict(settings),
        "versions": versions(),
        **figures,
        "checks": checks(figures),
        "seconds": time.perf_counter() - begin,
    }
    write_pictures(out, studies)
    write_json(out / "report.json", report)
    write_report_page(out, report)
    return report


def _study(
    name: str, variants: tuple[Variant, ...], out: Path, settings: Settings, samples: int
) -> Study:
    folder = out / name.partition(":")[2]
    float_folder = _fresh(folder / "float")
    export_demo(name, float_folder)
    pipe = DiffusionPipeline.from_pretrained(float_folder)
    few = settings.few_samples
    count = settings.flow_calibration_samples if saved_call(pipe) else settings.calibration_samples
    how: dict[str, Any] = {"steps": settings.steps, "guidance": settings.guidance}
    asked = asked_for(pipe, digits(count, settings.seed), count, settings.seed, **how)
    stats = calibrate(pipe, folder / f"stats-{settings.steps}x{count}", **asked)
    with progress_bar(f"{name} float", -(-samples // few)) as tick:
        baseline = Baseline.of(name, pipe, samples, few, settings.seed + 1, tick, **how)
    images = {"float": baseline.images}
    figures: dict[str, Any] = {
        "model": name,
        "labels": list(baseline.labels),
        "bytes": {"float": {}},  # by the categories of the first packed model, below
        "float": score_digits(baseline.images, baseline.labels),
        "variants": {},
    }
    layers = {}
    for variant in variants:
        result, finals, errors = _variant(variant, baseline, stats, folder)
        figures["variants"][variant.name] = result
        figures["bytes"][variant.name] = result.pop("bytes_by_category")
        images[variant.name] = finals
        if errors is not None:
            layers[variant.name] = errors
    like = open_folder(folder / variants[0].folder).scheme
    figures["bytes"]["float"] = size_by_category(open_folder(float_folder), like)
    return Study(figures, images, baseline.labels, stats, layers)


def _variant(
    variant: Variant, baseline: Baseline, stats: CalibrationStats, folder: Path
) -> tuple[dict[str, Any], torch.Tensor, tuple[list[str], torch.Tensor] | None]:
    recipe = variant.recipe
    target = _fresh(folder / variant.folder)
    begin = time.perf_counter()
    convert(baseline.pipe, recipe, stats, target, quiet=True)
    seconds = time.perf_counter() - begin
    packed, models = DiffusionPipeline.from_pretrained(target), transformers_in(baseline.pipe)
    calls, quantized = baseline.run.calls, transformers_in(packed)
    total = len(baseline.inputs) + sum(len(part) for part in calls)
    with progress_bar(f"{baseline.name} {variant.name}", total) as tick:
        own = run(packed, baseline.inputs, decode=True, tick=tick)
        forced = forced_sqnr(calls, quantized, tick)
    opened = open_folder(target)
    assert own.images is not None
    result = {
        "recipe": recipe.to_dict(),
        "sqnr_free": compare_runs(baseline.run, own).to_dict(),
        "sqnr_forced": forced.to_dict(),
        "psnr_db": pooled_psnr_db(baseline.images, own.images),
        **score_digits(own.images, baseline.labels),
        "convert_seconds": seconds,
        "bytes_on_disk": opened.nbytes,
        "bytes_by_category": size_by_category(opened),
        "execution": execution_report(packed.transformer).to_dict(),
    }
    errors = None
    if variant.per_layer:
        with progress_bar(f"{baseline.name} {variant.name} layers", total) as tick:
            found = layer_errors(CASCADE, models, quantized, calls, tick)
        errors = found.names, found.relative
    return result, own.images, errors


def checks(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What the demo is expected to show, with what it showed."""
    rows = []
    digits, salient, flow, flow_salient = (
        figures[name]["variants"] for name in ("digits", "salient", "flow", "flow_salient")
    )

    def at_least(what: str, value: float, least: float) -> None:
        rows.append({"what": what, "value": value, "at_least": least, "ok": value >= least})

    def mean(variant: dict[str, Any], mode: str = "free") -> float:
        return float(variant[f"sqnr_{mode}"]["mean_db"])

    for name, least in (("W8A8", 35.0), ("W4A8", 25.0)):
        at_least(f"{name} mean SQNR, dB", mean(digits[name]), least)
        kept = digits[name]["accuracy"] / figures["digits"]["float"]["accuracy"]
        at_least(f"{name} share of the float model's accuracy", kept, 0.98)
    for weights in ("W8A8", "W4A8"):
        for activations in ("static", "token"):
            smooth, linear = (
                mean(salient[f"{weights} {activations} {method}"])
                for method in ("smoothquant", "linear")
            )
            what = f"salient {weights} {activations}: smoothquant over linear, dB"
            at_least(what, smooth - linear, 10.0)
    at_least("flow W8A8 mean SQNR, forced, dB", mean(flow["W8A8"], "forced"), 38.0)
    for name, variants, least in (("flow", flow, 4.0), ("flow salient", flow_salient, 10.0)):
        gain = mean(variants[FED_BACK], "forced") - mean(variants[NO_DATA], "forced")
        at_least(f"{name} {FED_BACK} over data-free, forced, dB", gain, least)
        accuracy = variants[FED_BACK]["accuracy"]
        kept = accuracy / figures[name.replace(" ", "_")]["float"]["accuracy"]
        at_least(f"{name} {FED_BACK} share of the float model's accuracy", kept, 0.98)
    return rows


def _fresh(folder: Path) -> Path:
    """Remove what an earlier run left at a path that is ours to replace."""
    import shutil

    if folder.exists():
        shutil.rmtree(folder)
    return folder

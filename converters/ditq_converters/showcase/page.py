"""index.html: everything the demo made, on one page that needs no network."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from ditq_converters.evaluate.page import bytes_table
from ditq_converters.pages.origin import origin
from ditq_converters.pages.template import (
    Heading,
    details,
    neighbours,
    note,
    picture,
    side_by_side,
    table,
    write_page,
)
from ditq_converters.showcase.pictures import sample_name

CAVEAT = (
    "The planted outlier channels are the exact inverse of smoothing, so smoothing undoes them by construction: "
    "this table shows that the method is implemented right, not that smoothing wins on a real DiT-XL/2."
)
FLOW = (
    "A small Flux, trained by rectified flow on the same digits. Its own pipeline calibrates it, with prompts, at the "
    "size and guidance that its folder names."
)
WHAT = (
    "A Diffusion Transformer trained on handwritten digits, calibrated without data, converted to packed 8-bit and "
    "4-bit checkpoints, reloaded from disk through diffusers, and sampled in integers."
)
EMBEDDER = "<p>diffusers stores the timestep and label embedder in each block, ditq once.</p>"
OWN = "Each model on its own trajectory"
SAME = "All on the float model's latents"


def write_report_page(out: Path, report: dict[str, Any]) -> None:
    """Write index.html beside the pictures it shows."""
    digits, salient = report["digits"], report["salient"]
    parts = [
        f"<p>{WHAT}</p>",
        _checks(report["checks"]),
        "<h2>Same seeds, three models</h2>",
        _samples("digits", digits),
        _variants(digits),
        "<h2>Signal to quantization noise, per sampling step</h2>",
        side_by_side(
            [picture("sqnr-free-digits.png", OWN), picture("sqnr-forced-digits.png", SAME)]
        ),
        "<h2>Where the error is</h2>",
        side_by_side([picture(f"layers-{n.lower()}.png", _layers(n)) for n in ("W8A8", "W4A8")]),
        "<h2>Size</h2>",
        side_by_side(
            [
                bytes_table(digits["bytes"]) + EMBEDDER,
                picture("sizes.png", "The transformer on disk"),
            ]
        ),
        "<h2>Activations: they drift over the steps, and channels differ</h2>",
        side_by_side([_activations(kind, name) for name in STUDIES for kind in KINDS]),
        "<h2>A harder model: planted outlier channels (demo:digits-salient)</h2>",
        note(CAVEAT),
        *_study("salient", salient),
        "<h2>A model that takes prompts: demo:digits-flow</h2>",
        f"<p>{FLOW}</p>",
        *_study("flow", report["flow"]),
        "<h2>The same with planted outlier channels</h2>",
        *_study("flow_salient", report["flow_salient"]),
        "<h2>What ran</h2>",
        _execution(digits["variants"]["W4A8"]["execution"]),
    ]
    facts = {
        "calls": _settings(report["settings"]),
        "made with": origin(report["versions"], report["seconds"]),
    }
    heading = Heading(
        "ditq demo", "demo:digits, demo:digits-flow, and both with planted outliers", facts=facts
    )
    write_page(out, heading, parts, ["report.json"], neighbours(out))


STUDIES = {"digits": "demo:digits", "salient": "demo:digits-salient"}
KINDS = {"activations": "range of every channel", "drift": "range of each linear's input"}


def _study(name: str, study: dict[str, Any]) -> list[str]:
    """Figures, samples and curves of a model."""
    curves = {f"sqnr-free-{name}.png": OWN, f"sqnr-forced-{name}.png": SAME}
    shown = [picture(file, caption) for file, caption in curves.items()]
    return [_variants(study), _samples(name, study), side_by_side(shown)]


def _activations(kind: str, name: str) -> str:
    return picture(f"{kind}-{name}.png", f"{STUDIES[name]}: {KINDS[kind]} over the steps")


def _layers(name: str) -> str:
    return f"{name}: error of each linear on what its quantized predecessors give it"


def _settings(settings: dict[str, Any]) -> str:
    return (
        f"{settings['steps']} steps, guidance {settings['guidance']}; calibrated on "
        f"{settings['calibration_samples']} images, scored on others"
    )


def _samples(name: str, study: dict[str, Any]) -> str:
    """A grid per model, with its figure."""
    shown = [picture(sample_name(name, "float"), "float")]
    for model, variant in study["variants"].items():
        caption = f"{model}: {variant['sqnr_free']['mean_db']:.1f} dB"
        shown.append(picture(sample_name(name, model), caption))
    return side_by_side(shown, "samples")


def _checks(checks: list[dict[str, Any]]) -> str:
    rows = []
    for check in checks:
        mark = '<span class="ok">ok</span>' if check["ok"] else '<span class="missed">missed</span>'
        rows.append(
            [escape(check["what"]), f"{check['value']:.3g}", f"{check['at_least']:g}", mark]
        )
    return table(["what is expected", "measured", "at least", ""], rows)


def _variants(study: dict[str, Any]) -> str:
    base, sizes = study["float"], study["bytes"]
    judged = [f"{base['accuracy']:.3f}", _number(base["digit_fd"]), _mib(sizes["float"])]
    rows = [["float", "", "", "", *judged, ""]]
    for name, v in study["variants"].items():
        decibels = (v["sqnr_free"]["mean_db"], v["sqnr_forced"]["mean_db"], v["psnr_db"])
        judged = [f"{v['accuracy']:.3f}", _number(v["digit_fd"]), _mib(sizes[name])]
        figures = [f"{value:.1f}" for value in decibels]
        rows.append([escape(name), *figures, *judged, f"{v['convert_seconds']:.1f}"])
    header = [
        "model", "SQNR free, dB", "SQNR forced, dB", "PSNR, dB", "accuracy", "digit-FD", "MiB", "convert, s",
    ]  # fmt: skip
    count = len(study["labels"])
    if base["digit_fd"] is None:  # from 65 samples on
        at = header.index("digit-FD")
        header, *rows = ([*row[:at], *row[at + 1 :]] for row in (header, *rows))
        return table(header, rows) + f"<p>{count} samples per model.</p>"
    told = (
        f"<p>{count} samples per model. Digit-FD: Frechet distance to the real digits, on features of a small "
        "classifier; compare rows of this table alone.</p>"
    )
    return table(header, rows) + told


def _execution(execution: dict[str, Any]) -> str:
    rows = [
        [
            escape(layer["name"]),
            escape(layer["op"]),
            layer["weights"],
            layer["activations"],
            f"{layer['nbytes']:,}",
            layer["backend"],
            escape(layer["note"]),
        ]
        for layer in execution["layers"]
    ]
    t = execution["totals"]
    line = (
        f"<p>W4A8: {t['integer_linears']} of {t['linears']} linears in integers, {t['weight_only_linears']} "
        f"weight-only, {100 * t['integer_flops_share']:.1f} % of linear FLOPs in integers.</p>"
    )
    header = ["layer", "ops", "weights", "activations", "bytes", "backend", "note"]
    return line + details(f"all {len(rows)} layers", table(header, rows))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mib(parts: dict[str, int]) -> str:
    return f"{sum(parts.values()) / 2**20:.2f}"

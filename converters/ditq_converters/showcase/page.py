"""index.html: everything the demo made, on one page that needs no network."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .3em .8em; border-bottom: 1px solid #ddd; }
td { text-align: right; } td:first-child, th:first-child { text-align: left; } th { text-align: right; }
img { max-width: 100%; margin: .5em 0; } .ok { color: #228833; } .missed { color: #cc3311; font-weight: bold; }
.note { background: #f4f4f4; padding: .6em 1em; } h2 { margin-top: 2em; }
"""
CAVEAT = (
    "The planted outlier channels are the exact inverse of smoothing, so smoothing undoes them by construction: "
    "this table shows that the method is implemented right, not that smoothing wins on a real DiT-XL/2."
)
FLOW = (
    "A small Flux, trained by rectified flow on the same digits. Its own pipeline calibrates it, with prompts, at the "
    "size and guidance that its folder names."
)


def write_page(out: Path, report: dict[str, Any]) -> None:
    """Write index.html beside the pictures it shows."""
    parts = [
        "<h1>ditq demo</h1>",
        "<p>A Diffusion Transformer trained on handwritten digits, calibrated without data, converted to packed "
        "8-bit and 4-bit checkpoints, reloaded from disk through diffusers, and sampled in integers.</p>",
        _checks(report["checks"]),
        "<h2>Same seeds, three models</h2>",
        _image("samples-digits.png"),
        _variants(report["digits"]),
        "<h2>Signal to quantization noise, per sampling step</h2>",
        _image("sqnr-free-digits.png"),
        _image("sqnr-forced-digits.png"),
        "<h2>Where the error is</h2>",
        _image("layers-w8a8.png"),
        _image("layers-w4a8.png"),
        "<h2>Size</h2>",
        _sizes(report["digits"]["bytes"]),
        _image("sizes.png"),
        "<h2>Activations: they drift over the steps, and channels differ</h2>",
        *(
            _image(f"{kind}-{name}.png")
            for name in ("digits", "salient")
            for kind in ("activations", "drift")
        ),
        "<h2>A harder model: planted outlier channels (demo:digits-salient)</h2>",
        f'<p class="note">{CAVEAT}</p>',
        _variants(report["salient"]),
        _image("samples-salient.png"),
        _image("sqnr-free-salient.png"),
        _image("sqnr-forced-salient.png"),
        "<h2>A model that takes prompts: demo:digits-flow</h2>",
        f"<p>{FLOW}</p>",
        _variants(report["flow"]),
        _image("samples-flow.png"),
        _image("sqnr-free-flow.png"),
        _image("sqnr-forced-flow.png"),
        "<h2>The same with planted outlier channels</h2>",
        _variants(report["flow_salient"]),
        _image("samples-flow_salient.png"),
        _image("sqnr-free-flow_salient.png"),
        _image("sqnr-forced-flow_salient.png"),
        "<h2>What ran</h2>",
        _execution(report["digits"]["variants"]["W4A8"]["execution"]),
        f"<p>{escape(str(report['versions']))}; {report['seconds']:.0f} s in all; figures in report.json.</p>",
    ]
    html = (
        f"<!doctype html><meta charset='utf-8'><title>ditq demo</title><style>{STYLE}</style>"
        + "\n".join(parts)
    )
    (out / "index.html").write_text(html, encoding="utf-8")


def _image(name: str) -> str:
    return f'<p><a href="{name}"><img src="{name}" alt="{name}"></a></p>'


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _checks(checks: list[dict[str, Any]]) -> str:
    rows = []
    for check in checks:
        mark = '<span class="ok">ok</span>' if check["ok"] else '<span class="missed">missed</span>'
        rows.append(
            [escape(check["what"]), f"{check['value']:.3g}", f"{check['at_least']:g}", mark]
        )
    return _table(["what is expected", "measured", "at least", ""], rows)


def _variants(study: dict[str, Any]) -> str:
    base = study["float"]
    rows = [
        [
            "float",
            "",
            "",
            "",
            f"{base['accuracy']:.3f}",
            _number(base["digit_fd"]),
            _mib(study["bytes"]["float"]),
            "",
        ]
    ]
    for name, v in study["variants"].items():
        rows.append(
            [
                escape(name),
                f"{v['sqnr_free']['mean_db']:.1f}",
                f"{v['sqnr_forced']['mean_db']:.1f}",
                f"{v['psnr_db']:.1f}",
                f"{v['accuracy']:.3f}",
                _number(v["digit_fd"]),
                _mib(study["bytes"][name]),
                f"{v['convert_seconds']:.1f}",
            ]
        )
    samples = len(study["labels"])
    header = [
        "model",
        "SQNR free, dB",
        "SQNR forced, dB",
        "PSNR, dB",
        "accuracy",
        "digit-FD",
        "MiB",
        "convert, s",
    ]
    note = f"<p>{samples} samples per model; digit-FD compares rows of one table, from 65 samples on.</p>"
    return _table(header, rows) + note


def _sizes(sizes: dict[str, dict[str, int]]) -> str:
    categories = [
        c for c in next(iter(sizes.values())) if any(parts[c] for parts in sizes.values())
    ]
    rows = [[escape(c), *(f"{parts[c]:,}" for parts in sizes.values())] for c in categories]
    rows.append(["total bytes", *(f"{sum(parts.values()):,}" for parts in sizes.values())])
    return _table(["category", *sizes], rows)


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
    return line + _table(
        ["layer", "ops", "weights", "activations", "bytes", "backend", "note"], rows
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mib(parts: dict[str, int]) -> str:
    return f"{sum(parts.values()) / 2**20:.2f}"

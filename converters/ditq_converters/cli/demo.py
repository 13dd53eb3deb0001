"""`ditq demo`: the main job, end to end, on the model that ships with ditq."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditq_converters.cli import options as o
from ditq_runtime.cli.output import print_json, print_table, say


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for models, images, plots, report.json and index.html.")
    ] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps and samples; rougher figures.")
    ] = False,
    json: o.JsonOption = False,
) -> None:
    """Calibrate, convert to W8A8 and W4A8, reload, sample and compare, on a real trained model.

    Ends with a folder to look at: open OUT/index.html.

    Example: ditq demo --out runs/demo
    """
    from ditq_converters.showcase import Settings, run_showcase

    report = run_showcase(out, Settings.quick() if quick else Settings())
    if json:
        print_json(report)
        return
    rows = [
        (c["what"], c["value"], c["at_least"], "ok" if c["ok"] else "missed")
        for c in report["checks"]
    ]
    print_table("what the demo is expected to show", ("what", "measured", "at least", ""), rows)
    say(
        f"{out / 'index.html'}: open it in a browser; {report['seconds']:.0f} s, figures in {out / 'report.json'}"
    )

"""The one page of a report: what it is about, sentences, tables, figures that can be read on a phone, links."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from ditq_runtime.cli.output import are_figures
from ditq_runtime.cli.voice import voice

TAG = re.compile(r"<[^>]*>")
MARK = '<meta name="generator" content="ditq">'
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 0 auto; padding: 1rem; color: #222;
  overflow-wrap: anywhere; }
h1 { margin: .3em 0; } h2 { margin: 2em 0 .5em; } p { max-width: 46em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1em 1em; margin: 1em 0; } dd { margin: 0; }
dt, figcaption { color: #555; } code { font-size: .9em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 1em 0; overflow-wrap: normal; }
td, th { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom; }
td.text, th.text { text-align: left; } td:first-child, th:first-child { padding-left: 0; }
figure { margin: 1em 0; max-width: 40em; } figcaption { font-size: .95em; }
img { max-width: 100%; height: auto; display: block; }
.side { display: grid; gap: 0 2em; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30em), 1fr)); }
.samples { display: grid; gap: 0 1.5em; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17em), 1fr)); }
.samples img { width: 100%; image-rendering: pixelated; } .many th, .many td.text { overflow-wrap: anywhere; }
.note { background: #f4f4f4; padding: .6em 1em; } .ok { color: #228833; } .missed { color: #cc3311; font-weight: bold; }
nav, footer { margin-top: 2em; border-top: 1px solid #ddd; padding-top: .7em; }
@media (max-width: 600px) { table { font-size: .85em; } td, th { padding: .3em .4em; } h1 { font-size: 1.6em; } }
@media (max-width: 900px) { .many, .many tbody, .many tr, .many td { display: block; }
  .many tr:first-child, .many td:empty { display: none; }
  .many tr { border-bottom: 1px solid #ddd; padding: .5em 0; max-width: 30em; }
  .many td { border: 0; padding: .1em 0; text-align: right; overflow: hidden; overflow-wrap: anywhere; }
  .many td::before { content: attr(data-of); float: left; color: #555; margin-right: 1em; }
  .many td:first-child { text-align: left; font-weight: bold; } .many td:first-child::before { content: none; } }
"""
MANY = 4  # columns that a narrow screen shows side by side; of more, each row becomes a list of names and values


@dataclass(frozen=True)
class Heading:
    """What stands above every report.

    Attributes:
        title: "ditq eval", and so on.
        model: what was looked at.
        command: as it was typed; "" where a program called.
        date: and time, UTC; of now where it is not given.
        facts: further lines, name -> text.
    """

    title: str
    model: str
    command: str = field(default_factory=lambda: voice.line)
    date: str = field(
        default_factory=lambda: f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    )
    facts: Mapping[str, str] = field(default_factory=dict)


def write_page(
    folder: Path,
    heading: Heading,
    parts: Sequence[str],
    files: Sequence[str],
    links: Mapping[str, str],
    name: str = "index.html",
) -> None:
    """Write the page.

    Args:
        folder: the report's; pictures that the parts show lie in it.
        heading: what it is about.
        parts: HTML, in order; empty ones are left out.
        files: names in the folder that hold the figures.
        links: text -> address of other pages, relative to the folder.
        name: of the file; a folder that holds several reports has several.
    """
    body = "\n".join(part for part in (_head(heading), *parts, _files(files), _nav(links)) if part)
    html = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>\n"
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{MARK}\n'
        f"<title>{escape(heading.title)}: {escape(heading.model)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )
    (folder / name).write_text(html, encoding="utf-8")


def neighbours(folder: Path, name: str = "index.html") -> dict[str, str]:
    """Text -> address of the other reports of ditq in a report's folder and beside it."""
    home, found = folder.resolve(), {}
    for page in sorted([*home.glob("*.html"), *home.parent.glob("*/*.html")]):
        if (
            page == home / name
            or MARK not in page.read_text(encoding="utf-8", errors="ignore")[:400]
        ):
            continue
        text = page.parent.name if page.name == "index.html" else f"{page.parent.name}, {page.stem}"
        found[text] = page.name if page.parent == home else f"../{page.parent.name}/{page.name}"
    return found


def picture(name: str, caption: str) -> str:
    """A figure with its caption; it opens in full size."""
    text = escape(caption)
    return (
        f'<figure><a href="{escape(name)}"><img src="{escape(name)}" alt="{text}"></a>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def side_by_side(figures: Sequence[str], kind: str = "side") -> str:
    """Figures beside one another where there is room; `kind` "samples" for grids of images."""
    return f'<div class="{kind}">' + "".join(figures) + "</div>" if figures else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells, figures on the right and text on the left; of many columns, a list a row on a phone."""
    columns = [[TAG.sub("", row[i]) for row in rows] for i in range(len(header))]
    kinds = ["" if are_figures(column) else ' class="text"' for column in columns]
    head = "".join(
        f"<th{kind}>{escape(cell)}</th>" for kind, cell in zip(kinds, header, strict=True)
    )
    many = len(header) > MANY
    named = [
        f'{k} data-of="{escape(n)}"' if many else k for k, n in zip(kinds, header, strict=True)
    ]
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(named, row, strict=True))
        + "</tr>"
        for row in rows
    )
    kind = ' class="many"' if many else ""
    return f'<div class="wide"><table{kind}><tr>{head}</tr>{body}</table></div>'


def note(text: str) -> str:
    """A sentence that must not be missed."""
    return f'<p class="note">{escape(text)}</p>'


def details(summary: str, content: str) -> str:
    """Something long, folded."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _head(heading: Heading) -> str:
    facts = {
        "model": heading.model,
        "command": heading.command,
        "date": heading.date,
        **heading.facts,
    }
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{f'<code>{escape(text)}</code>' if name == 'command' else escape(text)}</dd>"
        for name, text in facts.items()
        if text
    )
    return f"<h1>{escape(heading.title)}</h1>\n<dl>{rows}</dl>"


def _files(names: Sequence[str]) -> str:
    linked = [f'<a href="{escape(name)}">{escape(name)}</a>' for name in names]
    return f"<footer>All figures: {', '.join(linked)}.</footer>" if linked else ""


def _nav(links: Mapping[str, str]) -> str:
    linked = [f'<a href="{escape(to)}">{escape(text)}</a>' for text, to in links.items()]
    return f"<nav>Other reports: {', '.join(linked)}.</nav>" if linked else ""

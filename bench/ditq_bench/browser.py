"""Open report pages in a headless browser, as narrow as a phone and as wide as a screen, and say what does not fit.

    python -m ditq_bench.browser runs/demo/index.html

A picture that is missing, a table that is cut off, and text or a figure that sticks out, are told one a line; the exit
code is then 1. What is folded is opened first.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (400, 1280)
MISSING = "no browser is installed, looked for " + ", ".join(BROWSERS)
SECONDS = 60
WRAP = """<!doctype html><meta charset="utf-8"><body>{frames}<pre></pre><script>
function look(frame) {{
  const page = frame.contentDocument, found = [], wide = frame.contentWindow.innerWidth;
  if (!page || !page.body || !page.body.innerText.trim()) return ["is empty"];
  for (const folded of page.querySelectorAll("details")) folded.open = true;
  for (const image of page.images)
    if (!image.complete || !image.naturalWidth) found.push("picture " + image.getAttribute("src") + " is missing");
  if (page.documentElement.scrollWidth > wide) found.push("is " + page.documentElement.scrollWidth + " pixels wide");
  for (const one of page.querySelectorAll(".wide"))
    if (one.scrollWidth > one.clientWidth + 1) found.push("table is cut off: " + one.innerText.slice(0, 60));
  for (const one of page.body.querySelectorAll("*")) {{
    if (one.closest(".wide") && !one.matches(".wide")) continue;
    const box = one.getBoundingClientRect();
    if (box.right > wide + 1 || box.left < -1)
      found.push(one.tagName.toLowerCase() + " sticks out: " + (one.innerText || one.src || "").slice(0, 60));
  }}
  return found;
}}
window.onload = () => document.querySelector("pre").textContent =
  JSON.stringify([...document.querySelectorAll("iframe")].map(look));
</script>"""


def find_browser() -> str | None:
    """The path of a browser that we can drive; None where there is none."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def faults(page: Path, browser: str, widths: tuple[int, ...] = WIDTHS) -> list[str]:
    """What does not fit on a page, a sentence each; none: all is well.

    Raises:
        RuntimeError: the browser did not open it.
    """
    frame = '<iframe src="{}" style="border:0;width:{}px;height:900px"></iframe>'
    frames = "".join(frame.format(html.escape(page.resolve().as_uri()), width) for width in widths)
    with TemporaryDirectory() as folder:
        wrapped = Path(folder) / "look.html"
        wrapped.write_text(WRAP.format(frames=frames), encoding="utf-8")
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            f"--user-data-dir={folder}/profile", "--dump-dom", wrapped.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    told = re.search(r"<pre>(\[.*\])</pre>", done.stdout, re.S)
    if told is None:
        raise RuntimeError(f"{browser} did not open {page}: {done.stderr.strip()[-300:]}")
    found = json.loads(html.unescape(told[1]))
    return [
        f"{page} at {width} pixels: {what}"
        for width, whats in zip(widths, found, strict=True)
        for what in whats
    ]


def main() -> int:
    """Look at the pages of the command line."""
    browser = find_browser()
    if browser is None:
        sys.stderr.write(f"{MISSING}; install one\n")
        return 1
    found = [fault for page in sys.argv[1:] for fault in faults(Path(page), browser)]
    sys.stdout.write("".join(f"{fault}\n" for fault in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

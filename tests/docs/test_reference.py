"""docs/reference/ is what the code says, every link leads somewhere, and the counts and sizes of the README hold."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")


def test_reference_pages_are_current():
    path = ROOT / "docs" / "write_reference.py"
    spec = importlib.util.spec_from_file_location("write_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stale = [
        name for name, text in module.pages().items() if (module.FOLDER / name).read_text() != text
    ]
    assert stale == [], "run python docs/write_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)  # code looks like links
    targets = [match[1] for match in LINK.finditer(text)]
    files = [target for target in targets if "://" not in target]
    assert [target for target in files if not (page.parent / target).exists()] == []


def _anchors(page):
    """What a link to a heading of a page may end with, as GitHub makes it of the heading."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M
    )
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {"#" + heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_headings(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
    links = [(page.parent / found[1], found[2]) for found in LINK.finditer(text) if found[2]]
    inside = [(page, anchor) for anchor in re.findall(r"\]\((#[^)]+)\)", text)]
    known = [(path, a) for path, a in [*links, *inside] if path.suffix == ".md" and path.exists()]
    assert [(path.name, a) for path, a in known if a not in _anchors(path)] == []


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / match[1]).resolve() for match in LINK.finditer(index.read_text())}
    assert {page for page in (ROOT / "docs").rglob("*.md")} - listed == {index}


def _cells(page, first):
    """Cells of the table row that begins with `first`."""
    row = next(line for line in page.read_text().splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split("|")[1:]]


def test_the_readme_counts_what_the_table_of_backends_says():
    lines = (ROOT / "docs" / "host_matrix.md").read_text().splitlines()
    rows = [line.split("|")[2:5] for line in lines if line.startswith("| ")]
    counted = []
    for cells in list(zip(*rows, strict=True)):
        cells = [cell.strip() for cell in cells[1:]]  # the first is the heading
        refused = sum(cell == "refused with a sentence" for cell in cells)
        worse, untried = sum(cell.startswith("no:") for cell in cells), cells.count("not run")
        counted.append(f"{len(cells) - refused - worse - untried}, {refused}, {worse}, {untried}")
    first = "rows of docs/host_matrix.md: work, are refused, fail, not run"
    assert _cells(ROOT / "README.md", first)[:3] == counted
    ours = counted[0].split(", ")
    said = f"{ours[0]} rows work, {ours[1]} are refused, none fail"
    assert said in (ROOT / "docs" / "host.md").read_text()


def test_sizes_compare_like_with_like():
    def size(first):
        return int(re.sub(r"\D", "", _cells(ROOT / "README.md", first)[-1]))

    whole = size("float, fp32, as diffusers saves it")
    once = size("float, fp32, with its embedder stored once")
    w8, w4 = size("W8A8"), size("W4A8")
    embedder = 4 * (
        128 * 256 + 128 + 128 * 128 + 128 + 1001 * 128
    )  # fp32: two linears, 1001 classes
    assert whole - once == 5 * embedder  # of the six blocks one keeps it
    assert round(100 * (whole - once) / (whole - w8)) == 40
    assert (round(once / w8, 1), round(once / w4, 1)) == (3.0, 4.4)

"""Every code block of README.md and docs/ runs, in order, as a reader would; at most ten are excused, with a reason.

Each day runs the README and a fifth of the pages. `DITQ_DOCS=all python -m pytest tests/docs` runs all of them.
"""

import datetime
import os
from pathlib import Path

import pytest

EXCUSED = 10
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PART = datetime.date.today().toordinal() % 5
DUE = [page for i, page in enumerate(PAGES) if "DITQ_DOCS" in os.environ or i == 0 or i % 5 == PART]


@pytest.mark.filterwarnings("default")  # what a reader would see of diffusers' own code
@pytest.mark.filterwarnings("error:.*is deprecated and will be removed:FutureWarning")  # our words
@pytest.mark.parametrize("page", DUE, ids=lambda page: page.stem)
def test_a_page_runs(page, run_page):
    run_page(page)


def test_few_blocks_are_excused(all_blocks):
    excused = [(name, block.line, block.excuse) for name, block in all_blocks if block.excuse]
    assert len(excused) <= EXCUSED, excused


def test_every_block_says_its_language(all_blocks):
    known = {"python", "sh", "json", "text", "html", "toml"}
    wrong = [(name, b.line, b.language) for name, b in all_blocks if b.language not in known]
    assert wrong == []


def test_the_pages_hold_blocks(all_blocks):
    """The parser sees them: a page of python blocks and one of indented commands."""
    ran = [(name, b.language) for name, b in all_blocks if not b.excuse]
    assert ran.count(("README.md", "python")) >= 1
    assert sum(language == "sh" for _, language in ran) > 20

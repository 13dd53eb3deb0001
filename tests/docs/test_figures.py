"""Figures of README.md and docs/ are those of bench/results: tables row by row, to the last digit that is printed."""

import csv
import re
from pathlib import Path

import pytest

from ditq_bench.frontier import means
from ditq_bench.method_tables import flow_table, tables

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
PEERS = {  # row of the README -> backend and what of bench/results/peers.csv
    "float, fp32": [("diffusers", "fp32")],
    "ditq, data-free / `smoothquant`": [("ditq", "w8, data-free"), ("ditq", "w8, smoothquant")],
    "8 bits, activations int8: torchao": [("torchao", "int8, activations int8")],
    "8 bits, activations float: optimum-quanto": [("optimum-quanto", "int8, activations float")],
    "8 bits, activations float: SDNQ": [("sdnq", "int8, activations float")],
    "ditq, `smoothquant` / with GPTQ and bias correction": [
        ("ditq", "w4p, smoothquant"), ("ditq", "w4p, smoothquant, gptq"),
    ],
    "4 bits, activations int8: torchao": [("torchao", "int4 in groups of 64, activations int8")],
    "4 bits, activations float: optimum-quanto": [("optimum-quanto", "int4, activations float")],
    "SDNQ with SVD": [
        ("sdnq", "uint4, activations float"),
        ("sdnq", "uint4 with SVD of rank 32, activations float"),
    ],
}  # fmt: skip
AUTO = {  # row of docs/auto.md -> case of bench/results/auto.csv
    "smoothquant, nearest, W4A8": "nearest w4p", "smoothquant, nearest, W8A8": "nearest w8",
    "on the fly, W4A8": "on the fly w4p", "on the fly, W8A8": "on the fly w8",
    "`auto`, smallest": "auto smallest", "`auto`, 15 %": "auto 15%", "`auto`, 16.6 %": "auto 16.6%",
    "`auto`, 18 %": "auto 18%", "`auto`, largest": "auto largest",
    **{
        f"{method}, {bits} bits": f"{method} {weights}"
        for method in ("meta", "ptq4dit", "smoothquant", "osplus", "htg", "ditas")
        for bits, weights in ((4, "w4p"), (8, "w8"))
    },
    **{
        f"`auto`, {end}, `--float-sites {number}`": f"auto {end} float {number}"
        for end in ("smallest", "largest")
        for number in (2, 4)
    },
}  # fmt: skip


def rows(name):
    with (ROOT / "bench" / "results" / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def table(text, heading):
    """Rows of the table whose first row begins so, cells by column."""
    lines = text[text.index(heading) :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0], cells[2:]


def printed(cell):
    return [number.replace(",", "") for number in NUMBER.findall(cell)]


def is_rounded(said, measured):
    """Whether a printed number is a measured one to its last digit, whichever way a half went."""
    digits = len(said.partition(".")[2])
    return abs(float(said) - float(measured)) <= 0.5 * 10**-digits + 1e-9


@pytest.mark.parametrize(
    ("said", "measured", "fits"),
    [
        ("31.4", "31.35", True),
        ("31.3", "31.35", True),
        ("7", "7.4", True),
        ("31.5", "31.44", False),
        ("2649841", "2649840", False),
    ],
)
def test_rounding_by_hand(said, measured, fits):
    assert is_rounded(said, measured) is fits


def peer_rows():
    """Name of PEERS -> cells; a row in bold opens a kind of backends."""
    kind, found = "", {}
    for first, *cells in table(page("README.md"), "| | bytes | SQNR, dB |")[1]:
        if bold := re.match(r"\*\*(.+?)\*\*: ", first):
            kind, first = bold[1], first[bold.end() :]
        name = re.sub(r"^(torchao|optimum-quanto|SDNQ) .*", rf"{kind}: \1", first)
        found["SDNQ with SVD" if "SVD" in first else name] = (first, cells)
    return found


def test_the_readme_says_what_was_measured_beside_others():
    measured = {(row["backend"], row["what"]): row for row in rows("peers.csv")}
    found = peer_rows()
    assert set(found) == {*PEERS, "nunchaku"}
    assert {key for keys in PEERS.values() for key in keys} == set(measured)
    for name, keys in PEERS.items():
        first, (sizes, sqnr) = found[name]
        each = [measured[key] for key in keys]
        assert printed(sizes) == list(dict.fromkeys(row["bytes"] for row in each)), name
        said = printed(sqnr)
        assert len(said) == sum(bool(row["sqnr_free_db"]) for row in each), name
        pairs = zip(said, each, strict=False)
        assert all(is_rounded(value, row["sqnr_free_db"]) for value, row in pairs), name
        assert "ditq" in first or "fp32" in first or each[0]["version"] in first, name


def test_the_readme_and_the_study_of_auto_convert_to_the_same_bytes():
    measured = {
        row["case"]: row["bytes"] for row in rows("auto.csv") if row["model"] == "demo:digits"
    }
    said = {first: cells for first, *cells in table(page("README.md"), "| `demo:digits` |")[1]}
    for first, case in {"W8A8": "nearest w8", "W4A8": "nearest w4p"}.items():
        assert printed(said[first][-1]) == [measured[case]]


def auto_means():
    return {(row["model"], row["case"]): row for row in means(rows("auto.csv"))}


def test_means_of_auto_are_those_of_its_rows():
    assert [{k: str(v) for k, v in row.items()} for row in means(rows("auto.csv"))] == rows(
        "auto_mean.csv"
    )


def fits_size(said, measured):
    """Whether a cell of bytes is what was measured, or a limit that holds it."""
    number = printed(said)[0]
    return float(measured) <= float(number) if said.startswith("at most") else number == measured


@pytest.mark.parametrize(
    ("heading", "columns"),
    [
        ("| | bytes | `demo:digits` |", ["sqnr_guided_db"]),
        ("| | bytes | `demo:digits-flow` |", ["sqnr_guided_db", "sqnr_forced_db"]),
    ],
)
def test_the_page_of_auto_says_what_was_measured(heading, columns):
    found = auto_means()
    heads, body = table(page("docs/auto.md"), heading)
    first_model = heads[2].strip("`")
    models = [first_model + head.strip("`").removeprefix(first_model) for head in heads[2:]]
    checked = 0
    for first, size, *cells in body:
        for model, cell in zip(models, cells, strict=True):
            if cell:
                row = found[model, AUTO[first]]
                said = printed(cell)
                assert len(said) == len(columns), (first, model)
                pairs = zip(said, columns, strict=True)
                assert all(is_rounded(value, row[name]) for value, name in pairs), (first, model)
                assert fits_size(size, row["bytes"]), (first, model)
                checked += 1
    assert checked >= 12


def jitter_table(found):
    return "\n".join(
        f"| {r['model']} | {r['case']} | {r['as_it_is_db']} | {r['mean_db']}, {r['deviation_db']} |"
        for r in found
    )


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("methods.csv", tables),
        ("flow.csv", lambda found: flow_table(found).replace("`demo:digits-", "").replace("`", "")),
        ("jitter.csv", jitter_table),
    ],
)
def test_the_study_prints_its_results(name, drawn):
    lines = {line for line in page("docs/methods_study.md").splitlines() if line.startswith("|")}
    wanted = [line for line in drawn(rows(name)).splitlines() if line.startswith("|")]
    assert len(wanted) > 5
    assert [line for line in wanted if line not in lines] == []


def test_the_page_of_diffusers_counts_the_forwards_of_threads():
    forwards = sum(int(row["cases"]) for row in rows("stress.csv") if "threads" in row["kind"])
    assert f"0 of {forwards:,}" in page("docs/host.md")


def test_the_supported_versions_are_those_that_are_tested():
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", page("constraints.txt"), re.M))
    cells = [line.split("|")[1:3] for line in page("docs/supported.md").splitlines() if "|" in line]
    found = [
        (name.strip().lower(), re.findall(r"\d+\.\d+(?:\.\d+)?", what)) for name, what in cells
    ]
    for package in ("torch", "diffusers", "triton"):
        first = next(versions[0] for name, versions in found if name == package)
        assert first == pinned[package], package
    releases = page("tests/bench/triton_releases.txt").split()
    assert ("triton", [releases[0], releases[-1]]) in found

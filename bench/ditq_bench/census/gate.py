"""What must hold for machine code, and how many instructions a hot loop may have: `budget.json`.

A budget is the largest count seen with the Triton releases it names; it only grows by a deliberate
`ditq bench census --check --update-budget`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ditq_bench.census.rows import CensusRow, KnownRow
from ditq_runtime.files import atomic_file

BUDGET = Path(__file__).with_name("budget.json")
# how their names begin; those of sm_100 do not say the types of operands
INTEGER_PRODUCT = {80: "IMMA", 86: "IMMA", 89: "IMMA", 120: "IMMA", 90: "IGMMA", 100: "UTCIMMA"}
THROUGH_REGISTERS = (90, 100)  # whose products could also take expanded weights from shared memory
# where stages behind a loop must leave room for a second program on a multiprocessor, to hide under its products
ROOM_FOR_TWO = {"gemm_w8a8": (80, 86, 89, 90, 120), "gemm_w4a8": (86, 89, 90, 120)}
STAGES = ("gathered", "low_rank", "residual", "ungated_residual", "gelu_quantize", "qkv_quantize")
ALONE = {("gemm_w4a8+low_rank", 90)}  # 132 registers with Triton 3.9.0, 128 would do
CONVERSIONS = ("F2I", "PRMT")  # of floats; of bytes, as in an operand with the wrong layout

Budget = dict[str, dict[str, dict[str, int]]]  # kernel -> target -> case -> instructions
Rule = Callable[[CensusRow], str | None]


def load_budget(path: Path = BUDGET) -> dict[str, Any]:
    """{"triton": releases seen, "instructions": Budget}; empty if there is no file."""
    if not path.exists():
        return {"triton": [], "instructions": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def update_budget(rows: Sequence[CensusRow | KnownRow], triton: str, path: Path = BUDGET) -> None:
    """Raise budgets to what rows need; drop cases of the same kernel and target that no row has. Atomic."""
    old = load_budget(path)
    releases = sorted({*old["triton"], triton})
    budget: Budget = old["instructions"]
    fresh: Budget = {}
    for row in rows:
        seen = budget.get(row.kernel, {}).get(str(row.target), {}).get(row.case, 0)
        cases = fresh.setdefault(row.kernel, {}).setdefault(str(row.target), {})
        cases[row.case] = max(seen, row.instructions)
    for kernel, targets in fresh.items():
        budget.setdefault(kernel, {}).update(targets)
    with atomic_file(path) as part:
        text = json.dumps({"triton": releases, "instructions": budget}, indent=1, sort_keys=True)
        part.write_text(text + "\n", encoding="utf-8")


def faults(row: CensusRow, budget: Budget) -> list[str]:
    """What is wrong with a row, a sentence each; empty if nothing is."""
    found = [rule(row) for prefix, rule in RULES if row.kernel.startswith(prefix)]
    found.append(_over_budget(row, budget))
    return [f"{row.name}: {fault}" for fault in found if fault is not None]


def known_faults(row: KnownRow, budget: Budget) -> list[str]:
    """The same of a launch that is not compiled: a table has none with other faults than a budget that shrank."""
    fault = _over_budget(row, budget)
    return [] if fault is None else [f"{row.name}: {fault}"]


def _over_budget(row: CensusRow | KnownRow, budget: Budget) -> str | None:
    """What is wrong with the number of instructions of a row."""
    allowed = budget.get(row.kernel, {}).get(str(row.target), {}).get(row.case)
    if allowed is None:
        return (
            "no budget; see it in the table, then run `ditq bench census --check --update-budget`"
        )
    if row.instructions > allowed:
        return f"{row.instructions} instructions, budget {allowed}"
    return None


def _spills(row: CensusRow) -> str | None:
    if row.census["spills"] or row.census["stack"]:
        return f"spills: {row.census['spills']} local memory instructions, {row.census['stack']} bytes a thread"
    return None


def _integer_products(row: CensusRow) -> str | None:
    wanted = INTEGER_PRODUCT[row.census["target"]]
    kinds = [name for name in row.census["mma"] if name.startswith(wanted)]
    if not any("S8.S8" in name or name.startswith("UTC") for name in kinds):
        return f"no {wanted} on int8, but {row.census['mma'] or 'no tensor cores at all'}"
    return None


def _conversions(row: CensusRow) -> str | None:
    if row.census["config"].get("programs_per_sm") and not row.census["config"]["specialize"]:
        return None  # one loop over tiles and inputs: the epilogue and divisions by sizes are in it, once a tile
    found = [name for name in CONVERSIONS if name in row.census["loop"]]
    return f"{' and '.join(found)} in the hot loop" if found else None


def _register_operand(row: CensusRow) -> str | None:
    target, found = row.census["target"], row.census["register_operands"]
    products = row.census["loop"].get(INTEGER_PRODUCT[target], 0)
    if target in THROUGH_REGISTERS and found != products:
        return f"weights do not come from registers: {found} of {products} products"
    return None


def _room_for_two(row: CensusRow) -> str | None:
    op, target = row.census["op"], row.census["target"]
    gemm, _, stages = op.partition("+")
    if stages not in STAGES or target not in ROOM_FOR_TWO.get(gemm, ()) or (op, target) in ALONE:
        return None
    if row.prediction.programs < 2:
        return f"one program fits on a multiprocessor, kept alone by {row.prediction.bound}"
    return None


# which kernels a rule is for, by the beginning of their names
RULES: tuple[tuple[str, Rule], ...] = (
    ("", _spills),
    ("gemm_", _integer_products),
    ("attention_qk_int8", _integer_products),
    ("gemm_w8a8", _conversions),
    ("gemm_w4", _register_operand),
    ("gemm_", _room_for_two),
)

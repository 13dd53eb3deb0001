"""What the study of auto converts: auto at several budgets, plain smoothquant, and single methods rounded as well."""

from __future__ import annotations

from typing import Any

from ditq_bench.hidden import HIDDEN

DITS = ("demo:digits", "demo:digits-salient", "demo:digits-asymmetric")
FLOWS = ("demo:digits-flow", "demo:digits-flow-salient", "demo:digits-flow-asymmetric")
MODELS = (*DITS, *FLOWS)

SINGLE = ("smoothquant", "osplus", "meta", "ditas", "ptq4dit", "htg")
SAME = {"rounding": "gptq", "bias_correction": True, "kept_dtype": "bf16", "attention": "none"}
NEAREST: dict[str, dict[str, Any]] = {  # smoothquant as it is
    "nearest w4p": {"weights": "w4p"},
    "nearest w8": {},
}
ON_THE_FLY: dict[str, dict[str, Any]] = {
    "on the fly w4p": {"method": "linear", "weights": "w4p"},
    "on the fly w8": {"method": "linear"},
}
SINGLES: dict[str, dict[str, Any]] = {
    f"{method} {weights}": {**SAME, "method": method, "weights": weights}
    for weights in ("w4p", "w8")
    for method in SINGLE
}
RIVALS = ("smoothquant w4p", "osplus w8")  # also with the judged classes hidden
BUDGETS = ("smallest", "15%", "16.6%", "18%", "largest")
ENDS = ("smallest", "largest")
AUTO = "auto "  # before a budget, in the name of a case
FLOATS = " float "  # between a budget and how many sites keep float activations


def cases_of(model: str) -> dict[str, dict[str, Any] | str]:
    """Name -> choices of a conversion, or the budget that auto is given."""
    budgets = BUDGETS if model in DITS else ENDS
    found: dict[str, dict[str, Any] | str] = {AUTO + budget: budget for budget in budgets}
    if model in FLOWS:
        floats = (f"{budget}{FLOATS}{number}" for budget in ENDS for number in (2, 4))
        return found | {AUTO + each: each for each in floats} | ON_THE_FLY | SINGLES
    hidden = {HIDDEN + AUTO + budget: budget for budget in ENDS}
    return found | NEAREST | SINGLES | hidden | {HIDDEN + name: SINGLES[name] for name in RIVALS}

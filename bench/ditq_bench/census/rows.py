"""The census of every kernel, architecture and tuned launch, one row each."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ditq_bench.census.issue_model import Prediction, predict
from ditq_kernels.launch import tuning
from ditq_runtime.files import atomic_file

TARGETS = (80, 86, 89, 90, 120)  # the GPUs we run on
WHOLE = (80, 86, 89, 90)  # of which the gate takes kernels with stages, too, by default
# compiled though it has no launch tables; the first Triton release with its int8 products for every kernel
UNSERVED = {100: (3, 9)}
MIX = 6  # opcodes shown
FIELDS = (
    "kernel", "target", "tokens", "inputs", "launch", "registers", "stack", "spills", "shared",
    "mma", "scope", "instructions", "products", "others_per_product", "issue_share", "limiter",
    "programs_per_sm", "kept_out_by", "mix",
)  # fmt: skip

Case = tuple[str, int, Any, Any]  # kernel, target, problem, launch


@dataclasses.dataclass(frozen=True)
class CensusRow:
    """One kernel compiled for one target.

    Attributes:
        problem: see `ditq_kernels._triton.offline.compile.Problem`.
        census: see `ditq_kernels._triton.offline.machine_code.Census`.
        prediction: of the issue model.
    """

    problem: dict[str, Any]
    census: dict[str, Any]
    prediction: Prediction

    @property
    def kernel(self) -> str:
        """Its name."""
        return self.census["op"]

    @property
    def target(self) -> int:
        """Compute capability without the dot."""
        return self.census["target"]

    @property
    def case(self) -> str:
        """What the row is budgeted under: problem and launch."""
        return case_text(self.problem["num_tokens"], self.problem["in_features"], self.launch)

    @property
    def name(self) -> str:
        """Of the row in a sentence."""
        return f"{self.kernel} on sm_{self.target} ({self.case})"

    @property
    def launch(self) -> str:
        """Such as "128x256x64, 8 warps, 3 stages"."""
        return tuning.launch_text(self.census["config"])

    @property
    def opcodes(self) -> dict[str, int]:
        """Of the hot loop; of the whole kernel if no loop has tensor-core instructions."""
        return self.census["loop"] or self.census["whole"]

    @property
    def instructions(self) -> int:
        """Warp instructions of one hot-loop iteration, or of the whole kernel."""
        return sum(self.opcodes.values())

    @property
    def products(self) -> int:
        """Tensor-core instructions among them."""
        return sum(count for name, count in self.opcodes.items() if "MMA" in name)

    def fields(self) -> dict[str, Any]:
        """What is printed, by name in FIELDS."""
        census, products = self.census, self.products
        share = self.prediction.issue_share
        mix = sorted(self.opcodes.items(), key=lambda item: -item[1])[:MIX]
        values = (
            census["op"], census["target"], self.problem["num_tokens"], self.problem["in_features"],
            self.launch, census["registers"], census["stack"], census["spills"], census["shared"],
            " ".join(f"{name} {count}" for name, count in census["mma"].items()) or "none",
            "loop" if census["loop"] else "kernel", self.instructions, products,
            round(self.instructions / products - 1, 2) if products else None,
            None if share is None else round(share, 2),
            self.prediction.limiter if share is not None or not products else "unknown",
            self.prediction.programs, self.prediction.bound,
            " ".join(f"{name} {count}" for name, count in mix),
        )  # fmt: skip
        return dict(zip(FIELDS, values, strict=True))


@dataclasses.dataclass(frozen=True)
class KnownRow:
    """A row that was counted before, see `known`.

    Attributes:
        text: its columns by name.
    """

    text: dict[str, str]

    def fields(self) -> dict[str, Any]:
        """What is printed, by name."""
        return {**self.text, "target": self.target}

    @property
    def kernel(self) -> str:
        """As in a census row."""
        return self.text["kernel"]

    @property
    def target(self) -> int:
        """As in a census row."""
        return int(self.text["target"])

    @property
    def case(self) -> str:
        """What the row is budgeted under."""
        return case_text(self.text["tokens"], self.text["inputs"], self.text["launch"])

    @property
    def name(self) -> str:
        """As in a census row."""
        return f"{self.kernel} on sm_{self.target} ({self.case})"

    @property
    def instructions(self) -> int:
        """As in a census row."""
        return int(self.text["instructions"])


def case_text(num_tokens: int | str, in_features: int | str, launch: str) -> str:
    """What a launch of a problem is budgeted under."""
    return f"{num_tokens} x {in_features}: {launch}"


def kernel_names() -> tuple[str, ...]:
    """Every kernel that compiles offline."""
    from ditq_kernels._triton.offline import compile as offline

    return tuple(offline.KERNELS)


def gated_targets(triton_version: str) -> tuple[int, ...]:
    """Architectures whose machine code must be sound with a Triton release."""
    from ditq_kernels.launch.gpus import release_of

    release = release_of(triton_version)
    return TARGETS + tuple(target for target, first in UNSERVED.items() if release >= first)


def cases(kernels: tuple[str, ...], targets: tuple[int, ...], usual_only: bool) -> list[Case]:
    """(kernel, target, problem, launch): every tuned launch, or only those of each kernel's usual problems."""
    from ditq_kernels._triton.offline import compile as offline

    return [
        (kernel, target, problem, config)
        for kernel in kernels
        for target in targets
        for problem, config in offline.tuned_problems(kernel, target)[
            : offline.KERNELS[kernel].checked if usual_only else None
        ]
    ]


def gated_cases(kernels: tuple[str, ...], triton_version: str) -> list[Case]:
    """What the gate takes by default: on sm_100 and sm_120 only kernels without stages, for time."""
    found = cases(kernels, gated_targets(triton_version), usual_only=True)
    return [case for case in found if case[1] in WHOLE or "+" not in case[0]]


def census_rows(found: Sequence[Case], advance: Callable[[], None]) -> list[CensusRow | str]:
    """Compile case after case, about a second each, and count.

    Returns:
        In order, a row for each case that compiles, and a sentence with the compiler's reason for each that does not.

    Raises:
        RuntimeError: TRITON_INTERPRET is set.
    """
    from ditq_kernels._triton.offline import compile as offline
    from ditq_kernels._triton.offline import machine_code

    offline.refuse_the_interpreter()
    made = []
    for case in found:
        made.append(_binary(case))
        advance()
    counted = iter(machine_code.censuses_of([one for one in made if not isinstance(one, str)]))
    rows: list[CensusRow | str] = []
    for (_, _, problem, _), one in zip(found, made, strict=True):
        if isinstance(one, str):
            rows.append(one)
        else:
            census = dataclasses.asdict(next(counted))
            rows.append(CensusRow(dataclasses.asdict(problem), census, predict(census)))
    return rows


def _binary(case: Case) -> Any:
    """The compiled kernel, or why there is none."""
    from ditq_kernels._triton.offline import compile as offline

    try:
        return offline.binary_of(*case)
    except Exception as error:  # compilers fail in many ways
        kernel, target, _, config = case
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        launch = tuning.launch_text(dataclasses.asdict(config))
        return (
            f"{kernel} on sm_{target} ({launch}) does not compile: {type(error).__name__}: {reason}"
        )


def write_csv(path: Path, rows: list[CensusRow]) -> None:
    """Write all rows atomically."""
    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(row.fields() for row in rows)

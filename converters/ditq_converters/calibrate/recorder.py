"""Hooks that watch a model: every linear input's range per channel and a few of its rows; Q, K and V's ranges."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.rows import RowPlan, Selection
from ditq_converters.calibrate.stats import StatisticsError
from ditq_converters.sites.operands import OperandWatch
from ditq_runtime.families import Family

STORED = (torch.float32, torch.bfloat16, torch.float16)  # row dtypes; any other is stored as fp32


class Recorder:
    """Running minimum and maximum of every site, per channel, and the chosen rows of the current call."""

    def __init__(
        self, model: nn.Module, family: Family, rows: RowPlan, attention: bool = True
    ) -> None:
        """Remember where to listen; nothing is hooked before `with`.

        Args:
            model: the transformer.
            family: its table.
            rows: which rows to keep.
            attention: also listen to Q, K and V of every attention that can run quantized.
        """
        self._plan = rows
        self._listen = [
            (f"{block}.{site.name}", model.get_submodule(f"{block}.{name}"), name)
            for block, table in family.block_tables(model).items()
            for site in table.sites
            for name in site.observed
        ]
        self._attentions = family.attention_names(model) if attention else []
        self._operands = OperandWatch(
            {name: model.get_submodule(name) for name in self._attentions},
            lambda operand, rows: self._observe_range(operand, rows.float()),
        )
        self._hooks: list[Any] = []
        self.begin(0)

    def __enter__(self) -> Recorder:
        """Install the hooks."""
        first: dict[str, str] = {}  # site -> the consumer whose rows are kept
        for site, module, name in self._listen:
            keeps = first.setdefault(site, name) == name
            self._hooks.append(module.register_forward_pre_hook(self._observer(site, keeps)))
        self._operands.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove the hooks."""
        self._operands.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def begin(self, call: int) -> None:
        """Forget the last call and listen to `call`."""
        self._call = call
        self._ranges: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows: dict[str, torch.Tensor] = {}
        self._seen: dict[str, int] = {}  # site -> samples that passed it
        self._selections: dict[int, Selection] = {}  # tokens per sample -> chosen rows

    def ranges(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Site -> (min [K], max [K]) fp32 on the CPU, over everything since `begin`.

        Raises:
            StatisticsError: an attention ran something else than scaled_dot_product_attention.
        """
        for name in self._attentions:
            if f"{name}.q" not in self._ranges:
                raise StatisticsError(
                    f"{name}: did not call scaled_dot_product_attention, where Q, K and V are recorded; set diffusers' "
                    "default processor and backend, or calibrate with --no-attention"
                )
        return {site: (low.cpu(), high.cpu()) for site, (low, high) in self._ranges.items()}

    def rows(self) -> dict[str, torch.Tensor]:
        """Site -> kept rows [n, K] in the model's dtype, on the CPU; empty at calls that keep none."""
        return dict(self._rows)

    def _observer(self, site: str, keeps_rows: bool) -> Any:
        def observe(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach()
            self._observe_range(site, x.reshape(-1, x.shape[-1]).float())
            if keeps_rows and self._plan.count and self._call in self._plan.calls:
                self._keep_rows(site, x)

        return observe

    def _observe_range(self, site: str, rows: torch.Tensor) -> None:
        low, high = rows.amin(0), rows.amax(0)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise StatisticsError(
                f"{site}: the float model produced a value that is not finite; check its weights"
            )
        if site in self._ranges:
            before = self._ranges[site]
            low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
        self._ranges[site] = (low, high)

    def _keep_rows(self, site: str, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        tokens, size = len(flat) // len(x), len(x) // (2 if self._plan.guided else 1)
        if tokens not in self._selections:
            self._selections[tokens] = self._plan.select(self._call, tokens)
        selection, start = self._selections[tokens], self._seen.get(site, 0)
        if site not in self._rows:
            dtype = x.dtype if x.dtype in STORED else torch.float32
            self._rows[site] = torch.empty(selection.count, x.shape[-1], dtype=dtype)
        slot, row = selection.locate(start, size, tokens)
        self._rows[site][slot] = flat[row.to(x.device)].cpu().to(self._rows[site].dtype)
        self._seen[site] = start + size

"""What a pipeline passed to its transformer last: inputs for a report where the family table has none."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ditq_runtime.report.execution import ExecutionReport


class LastInputs:
    """Notes the inputs of a transformer's forwards while a pipeline samples.

    Attributes:
        inputs: keyword arguments of the last forward; None before it, and where `execution_report` needs none.
        ran: whether there was one.
    """

    def __init__(self, model: nn.Module) -> None:
        """Note nothing yet."""
        from ditq_runtime.families import family_of

        self.inputs: dict[str, Any] | None = None
        self.ran = False
        self._model = model
        self._hook: Any = None
        self._packed = (
            getattr(getattr(model, "config", None), "quantization_config", None) is not None
        )
        self._wanted = family_of(type(model).__name__).example_inputs is None

    def __enter__(self) -> LastInputs:
        """Listen."""
        if self._packed:
            self._hook = self._model.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        if self._hook is not None:
            self._hook.remove()

    def report(self) -> ExecutionReport:
        """What ran in the last forward."""
        from ditq_runtime.report.execution import execution_report

        return execution_report(self._model, self.inputs)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran = True
        if self._wanted:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
            self.inputs = {n: value for n, value in bound.arguments.items() if n != "self"}

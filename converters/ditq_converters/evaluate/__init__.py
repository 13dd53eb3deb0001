"""Measure a packed model against its float model: SQNR per step, error per layer, images, distances, sizes."""

from ditq_converters.evaluate.evaluation import evaluate
from ditq_converters.evaluate.layer_error import (
    LayerErrors,
    cascade_errors,
    forced_errors,
    layer_errors,
)
from ditq_converters.evaluate.records import SAMPLERS, Evaluation, EvaluationSettings
from ditq_converters.evaluate.sqnr import (
    SqnrCurve,
    compare_runs,
    forced_sqnr,
    halves_sqnr,
    run,
    sqnr_db,
)

__all__ = [
    "SAMPLERS",
    "Evaluation",
    "EvaluationSettings",
    "LayerErrors",
    "SqnrCurve",
    "cascade_errors",
    "compare_runs",
    "evaluate",
    "forced_errors",
    "forced_sqnr",
    "halves_sqnr",
    "layer_errors",
    "run",
    "sqnr_db",
]

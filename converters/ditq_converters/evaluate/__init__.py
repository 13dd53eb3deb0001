"""Measure a packed model against its float model: SQNR per step, error per layer, images, distances, sizes."""

from ditq_converters.evaluate.evaluation import evaluate
from ditq_converters.evaluate.layer_error import LayerErrors, layer_errors
from ditq_converters.evaluate.records import Evaluation, EvaluationSettings
from ditq_converters.evaluate.runs import Run, run
from ditq_converters.evaluate.sqnr import SqnrCurve, compare_runs, forced_sqnr, sqnr_db

__all__ = [
    "Evaluation",
    "EvaluationSettings",
    "LayerErrors",
    "Run",
    "SqnrCurve",
    "compare_runs",
    "evaluate",
    "forced_sqnr",
    "layer_errors",
    "run",
    "sqnr_db",
]

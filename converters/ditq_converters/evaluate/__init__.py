"""Measure a packed model against its float model: SQNR per step, error per layer, images, sizes."""

from ditq_converters.evaluate.layer_error import layer_errors
from ditq_converters.evaluate.sqnr import SqnrCurve, compare_runs, forced_sqnr, run, sqnr_db

__all__ = ["SqnrCurve", "compare_runs", "forced_sqnr", "layer_errors", "run", "sqnr_db"]

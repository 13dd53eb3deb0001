"""The workshop: turn a float Diffusion Transformer into a packed low-bit checkpoint, offline.

from ditq_converters import Recipe, calibrate, convert, open_model
pipe = open_model("demo:digits")
stats = calibrate(pipe, out="stats")
packed = convert(pipe, Recipe(method="smoothquant", weights="w4p"), stats, out="out")
evaluate(packed, pipe, out="report")
"""

from ditq_converters.calibrate import calibrate
from ditq_converters.convert import convert
from ditq_converters.evaluate import evaluate
from ditq_converters.models import open_model
from ditq_converters.recipe import Recipe
from ditq_converters.stats import CalibrationStats, StatisticsError

__all__ = [
    "CalibrationStats",
    "Recipe",
    "StatisticsError",
    "calibrate",
    "convert",
    "evaluate",
    "open_model",
]

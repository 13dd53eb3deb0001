"""The workshop: turn a float Diffusion Transformer into a packed low-bit checkpoint, offline.

from ditq_converters import Recipe, calibrate, convert, open_model
pipe = open_model("demo:digits")
stats = calibrate(pipe, out="stats")
packed = convert(pipe, Recipe(method="smoothquant", weights="w4p"), stats, out="out")
evaluate(packed, pipe, out="report")
"""

from ditq_converters.calibrate.run import calibrate
from ditq_converters.calibrate.stats import CalibrationStats, StatisticsError
from ditq_converters.convert.story import convert
from ditq_converters.evaluate import evaluate
from ditq_converters.models.open import open_model
from ditq_converters.plan.recipe import Recipe

__all__ = [
    "CalibrationStats",
    "Recipe",
    "StatisticsError",
    "calibrate",
    "convert",
    "evaluate",
    "open_model",
]

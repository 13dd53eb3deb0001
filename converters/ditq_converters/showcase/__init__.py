"""The main job on the built-in model, end to end, ending in a folder a person can look at: `ditq demo`."""

from ditq_converters.showcase.records import Settings
from ditq_converters.showcase.run import run_showcase

__all__ = ["Settings", "run_showcase"]

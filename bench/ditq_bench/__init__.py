"""Measure: kernel latencies against the strongest baselines, every row gated by a numeric check."""

from ditq_bench.shapes import SHAPES, GemmShape

__all__ = ["SHAPES", "GemmShape"]

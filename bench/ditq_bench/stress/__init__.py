"""Attacks on ditq, bounded in time, from printed seeds: `python -m ditq_bench.stress`. Open `command.py` first."""

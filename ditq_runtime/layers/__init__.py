"""Modules that play packed tensors, and what a block notes for them. Open `linear.py` first."""

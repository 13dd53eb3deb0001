"""Modules that play packed tensors, and what travels with a forward. Open `linear.py`, then `site.py`, `carrier.py`."""

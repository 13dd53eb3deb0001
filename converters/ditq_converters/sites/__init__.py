"""What reads the same input, and what feeds it. Open `find.py` first.

In comes a float model and the inputs of one forward; out goes a `Family`: what each block's linears read, what feeds
it, and why the other linears stay float.
"""

from ditq_converters.sites.find import family_for, family_or_row, find_sites

__all__ = ["family_for", "family_or_row", "find_sites"]

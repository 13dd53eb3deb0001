"""The public ops: docstring, checks, dispatch. Open `linear.py` first."""

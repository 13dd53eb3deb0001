"""Runs of the float model -> statistics of what its linears read. Open `run.py` first."""

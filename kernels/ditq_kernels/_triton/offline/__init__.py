"""Compile every kernel for a GPU that is not there, and read its machine code. Open `compile.py` first."""

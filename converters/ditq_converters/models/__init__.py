"""A name, folder or file -> a float model or pipeline. Open `open.py` first."""

"""Model and choices -> what happens to every linear. Open `layers.py` first."""

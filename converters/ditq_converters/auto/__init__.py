"""A model, its statistics and a budget in bytes -> the plan with the least error that fits. Open `search.py` first."""

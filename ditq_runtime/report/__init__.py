"""What ran in a forward, per linear and attention. Open `execution.py` first."""

"""What is prepared before a sampling loop: hoisted modulation, CUDA graphs. Open `prepare.py` first."""

"""What reads the same input, and what the statistics say about it. Open `sites.py` first."""

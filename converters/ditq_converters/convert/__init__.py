"""Float model and choices -> packed checkpoint: fold (exact), quantize (lossy), pack. Open `story.py` first."""

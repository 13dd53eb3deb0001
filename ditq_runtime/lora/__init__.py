"""LoRA adapters through folded scales. Open `adapter.py` first."""

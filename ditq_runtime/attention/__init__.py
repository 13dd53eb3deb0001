"""Attention whose products run in int8: modules, processors, diffusers backends. Open `quantized.py` first."""

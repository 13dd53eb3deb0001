"""diffusers' own tests of models, quantizers and LoRA, against quantized models. Open `command.py` first."""

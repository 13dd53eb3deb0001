"""What diffusers and the hub see: the quantizer plug-in, loading, refusals, switches. Open `plugin.py` first."""

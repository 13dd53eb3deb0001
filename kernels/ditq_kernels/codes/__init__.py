"""What a code means and where its bits sit: rounding, scales, packing, quantized weights."""

"""What several kernels share: epilogues, row loops, stages, prepared weights."""

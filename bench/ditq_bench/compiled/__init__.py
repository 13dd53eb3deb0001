"""Launches of a block as Inductor compiles it for a GPU, counted in the code that it generates, without one."""

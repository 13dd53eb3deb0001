"""A command line in, calls of the wings below, figures and words out: calibrate, plan, inspect, convert, eval, demo."""

"""`torch.compile(model, backend="ditq")`: passes over the graph, then Inductor. Open `compile.py` first."""

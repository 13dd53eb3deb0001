"""The packed checkpoint as bytes: scheme, headers, folders; knows no module. Open `scheme.py` first."""

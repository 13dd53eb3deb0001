"""The conversions that every class goes through: each method that needs data, three ways, and 8 and 4 bits without."""

from __future__ import annotations

from typing import Any

HTG = {"method": "htg", "num_groups": 2, "attention": "none"}
SMOOTHQUANT = {"method": "smoothquant"}
DITAS = {"method": "ditas", "lora_rank": 0}
STATIC = {"weights": "w8", "activations": "static"}
FOUR_BITS = {"weights": "w4p", "rounding": "gptq"}
RECIPES: dict[str, dict[str, Any]] = {
    "linear-w8": {"method": "linear", "weights": "w8"},
    "linear-w4p": {"method": "linear", "weights": "w4p"},
}
for _name, _method in (("smoothquant", SMOOTHQUANT), ("htg", HTG), ("ditas", DITAS)):
    RECIPES[f"{_name}-w8"] = {**_method, "weights": "w8"}
    RECIPES[f"{_name}-w8-static"] = {**_method, **STATIC}
    RECIPES[f"{_name}-w4p-gptq"] = {**_method, **FOUR_BITS}
REFUSED = "follows the timestep, and"  # a class with several timesteps or none, told by name

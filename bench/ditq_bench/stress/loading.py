"""Damaged folders through `from_pretrained`: what loads has the tensors and the configuration of the undamaged."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from diffusers import DiTTransformer2DModel

from ditq_bench.stress import reader
from ditq_bench.stress.outcome import Tally, bounded
from ditq_bench.stress.target import Target

NOTES = ("_name_or_path", "_use_default_values", "_diffusers_version", "quantization_config")


def attack(one: Target, shards: Target, cases: int, seed: int) -> list[Tally]:
    """Load damaged copies; arguments as those of `reader.attack`."""
    tally = Tally("from_pretrained", seed)
    with bounded():
        for number in range(cases):
            reader.run_case(tally, number, _case, one, shards)
    return [tally]


def _case(one: Target, shards: Target, rng: random.Random) -> tuple[str, Callable[[], bool]]:
    what, _ = reader.any_case(rng)(one, shards, rng)
    hit = shards if _differs(shards) else one
    return what, lambda: _loads(hit)


def _differs(target: Target) -> bool:
    names = {path.name for path in target.folder.iterdir()}
    return names != target.files.keys() or any(
        (target.folder / name).is_dir() or (target.folder / name).read_bytes() != content
        for name, content in target.files.items()
    )


def _loads(target: Target) -> bool:
    model = DiTTransformer2DModel.from_pretrained(target.folder)
    truth = {k: v for k, v in target.config.items() if k not in NOTES and k != "_class_name"}
    state = model.state_dict()
    return (
        {key: _listed(model.config[key]) for key in truth} == truth
        and state.keys() == target.state.keys()
        and all(torch.equal(tensor, target.state[name]) for name, tensor in state.items())
    )


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value

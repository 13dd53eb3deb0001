"""The thread stress, for half a minute: no forward differs, whatever the threads do; and it would see one that does."""

import json
from pathlib import Path

import diffusers
import pytest
import torch

from ditq_bench.stress import threads
from ditq_runtime.layers import carrier, timestep_groups

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "version1"
NAMES = ("dit_htg", "dit_token", "pixart", "sd3", "flux")
COMBINATIONS = [
    *((name, "shared") for name in NAMES),
    ("dit_htg", "several"),
    *((name, "prepared") for name in ("dit_htg", "pixart")),
    *((name, "reported") for name in ("dit_htg", "sd3")),
]
SECONDS = 30 / len(COMBINATIONS)  # half a minute in all


@pytest.fixture(scope="module")
def model():
    """Name of a fixture -> its packed transformer; all formats, three with timestep groups."""
    loaded = {}

    def load(name):
        if name not in loaded:
            folder = FIXTURES / name
            told = json.loads((folder / "expected.json").read_text())
            cls = getattr(diffusers, told["class"])
            loaded[name] = cls.from_pretrained(folder / "transformer")
        return loaded[name]

    return load


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_threads_get_the_bits_of_one(model, name, kind):
    outcome = threads.stress_model(name, model(name), kind, forwards=39, seconds=SECONDS)
    assert outcome.wrong == 0
    assert outcome.forwards >= 39


class _Shared:
    """What every thread would see if it were not the thread's own."""

    forward = carrier.Forward()


def test_it_would_see_state_that_threads_share(model, monkeypatch):
    monkeypatch.setattr(carrier, "_HERE", _Shared())
    wrong, flux = 0, model("flux")
    for _ in range(20):
        try:
            wrong += threads.stress_model("flux", flux, "shared", forwards=39).wrong
        except (ValueError, RuntimeError):
            wrong += 1  # another thread's end took the timestep away
        if wrong:
            break
    assert wrong


def test_nothing_stays_behind(model):
    grouped = model("dit_htg")
    inputs = dict(threads.family_of("DiTTransformer2DModel").example_inputs(grouped))
    seen = []
    hook = grouped.proj_out_2.register_forward_hook(lambda *_: seen.append(carrier.here().index))
    with torch.no_grad():
        grouped(**inputs)
    assert seen[0] is not None
    hook.remove()

    def fail(*_):
        raise KeyError("from a hook")

    hook = grouped.transformer_blocks[1].register_forward_hook(fail)
    with pytest.raises(KeyError), torch.no_grad():
        grouped(**inputs)
    hook.remove()
    assert vars(carrier.here()) == dict.fromkeys(("timestep", "index", "hoisted", "watch"))
    with pytest.raises(ValueError, match="outside of a forward of its model"):
        timestep_groups.group_index(3)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_read_what_belongs_to_their_own_thread():
    folder = FIXTURES / "flux" / "transformer"
    flux = diffusers.FluxTransformer2DModel.from_pretrained(folder)
    torch.compiler.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    flux.transformer_blocks[0].compile(backend=backend, fullgraph=True)  # it is told no timestep
    outcome = threads.stress_model("flux", flux, "shared", forwards=39)
    torch.compiler.reset()
    assert (outcome.wrong, outcome.forwards) == (0, 39)
    assert len(graphs) == 1

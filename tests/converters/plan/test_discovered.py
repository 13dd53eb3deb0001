"""Every method on classes without a table: sites found on a forward, transforms where they fold or in the quantizer."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

from ditq_bench.zoo import CLASSES
from ditq_converters import convert, make_plan
from ditq_converters.plan import make
from ditq_converters.sites import family_for
from ditq_runtime import execution_report

CALLS = 4


def lumina2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, hidden_size=64, num_layers=2, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=32, axes_dim_rope=(4, 6, 6), axes_lens=(30, 16, 16), cap_feat_dim=32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=generator),
        "encoder_attention_mask": torch.ones(2, 6, dtype=torch.bool),
    }


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        max_text_seq_length=6,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    return model, {
        "hidden_states": torch.randn(2, 2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=generator),
    }


class Recorded:
    """What a calibration of some forwards knows, read as `CalibrationStats` is."""

    folder, has_attention, has_rows, differing_timesteps = "stats", False, True, 0

    def __init__(self, model, family, batches, times):
        self.timesteps, self.calls = times, len(times)
        self.manifest = {"rows": {"calls": list(range(len(times)))}, "calls": len(times)}
        self.manifest |= {"sampler": "", "model_hash": "", "plan": {"guidance": 1, "labels": []}}
        self.provenance = {"calls": self.calls}
        self._rows = {}
        for block, table in family.block_tables(model).items():
            for site in table.sites:
                self._rows[f"{block}.{site.name}"] = self._run(
                    model, [f"{block}.{name}" for name in site.observed], batches
                )
            for name in table.modulations:
                self._rows[f"{block}.{name}"] = self._run(model, [f"{block}.{name}"], batches)

    def modulation(self, name):
        rows = self._rows[name]
        return rows.flatten(0, 1).float(), tuple(i for i in range(self.calls) for _ in rows[i])

    @staticmethod
    def _run(model, names, batches):
        seen, hooks = [], []
        for name in names:
            keep = lambda _, args: seen[-1].append(args[0].flatten(0, -2))  # noqa: E731
            hooks.append(model.get_submodule(name).register_forward_pre_hook(keep))
        for batch in batches:
            seen.append([])
            model(**batch)
        for hook in hooks:
            hook.remove()
        return torch.stack([torch.cat(rows) for rows in seen])  # [T, n, K]

    def ranges(self, site):
        return self._rows[site].amin(1), self._rows[site].amax(1)

    def rows(self, site):
        return self._rows[site][:, :24].float(), tuple(range(self.calls))

    def check_model(self, model):
        pass


@pytest.fixture(scope="module", params=[lumina2, cogvideox])
def case(request):
    """A model with salient channels, a batch at mixed timesteps, inputs to find sites by, statistics."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model, batch = request.param()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.05)
            if name.endswith("norm1.norm.weight"):
                parameter *= torch.randn(parameter.shape).mul(1.5).exp()
        model = model.eval().requires_grad_(False)
        unit = 1 if request.param is lumina2 else 1000
        times = [unit * t for t in (0.9, 0.6, 0.4, 0.1)]
        batches = [{**batch, "timestep": torch.tensor([t, t])} for t in times]
        batch = {**batch, "timestep": torch.tensor([times[0], times[3]])}
        stats = Recorded(model, family_for(model, batch), batches, times)
    return SimpleNamespace(model=model, batch=batch, stats=stats)


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


CASES = [
    {"method": "smoothquant"},
    {"method": "smoothquant", "activations": "static"},
    {"method": "smoothquant", "activations": "token_asym"},
    {"method": "ptq4dit", "attention": "none"},
    {"method": "htg", "num_groups": 2, "activations": "static", "attention": "none"},
    {"method": "htg", "num_groups": 2, "activations": "token_asym", "bias_correction": True},
    {
        "method": "ditas",
        "weights": "w4p",
        "group_size": 32,
        "search": False,
        "lora_rank": 4,
        "rounding": "gptq",
    },
]


@pytest.mark.parametrize("choices", CASES, ids=lambda c: f"{c['method']}-{len(c)}")
def test_every_method_runs_in_integers_and_stays_close(case, choices, tmp_path):
    """Errors of 8 bits are a percent or two, of 4 bits 17 times that; a wrong fold is of order 1."""
    plan = make_plan(case.model, case.stats, inputs=case.batch, **choices)
    packed = convert(case.model, plan, case.stats, tmp_path / "out", quiet=True, inputs=case.batch)
    truth, ours = run(case.model, case.batch), run(packed, case.batch)
    bound = 0.4 if "weights" in choices else 0.06
    assert 0 < float((ours - truth).norm() / truth.norm()) < bound
    loaded = type(case.model).from_pretrained(tmp_path / "out")
    assert torch.equal(run(loaded, case.batch), ours)
    assert execution_report(loaded, case.batch).totals["integer_flops_share"] > 0.5


def test_shifts_per_timestep_group_go_into_quantizers(case):
    choices = {"method": "htg", "num_groups": 2, "attention": "none"}
    plan = make_plan(case.model, case.stats, inputs=case.batch, **choices)
    packed = convert(case.model, plan, case.stats, quiet=True, inputs=case.batch)
    scheme = packed.config.quantization_config.scheme
    groups = {
        site.name: scheme.sites[site.name].quantizer_shifts
        for site in plan.sites
        if site.method == "htg" and site.place == "quantizer"
    }
    assert len(groups) >= 4
    assert set(groups.values()) <= {1, 2}  # one where the input does not follow the timestep
    assert list(groups.values()).count(2) >= 4
    some = next(site for site in plan.sites if groups.get(site.name) == 2)
    shift = packed.state_dict()[
        f"{some.name.rpartition('.')[0]}.ditq_sites.{some.name.rpartition('.')[2]}.shift"
    ]
    low, high = (side.double() for side in case.stats.ranges(some.name))
    centres = (
        low + high
    ) / 2  # [T, K], noisiest first; two groups of contiguous calls, by rising timestep
    candidates = [torch.stack([centres[n:].mean(0), centres[:n].mean(0)]) for n in range(1, CALLS)]
    assert any(torch.allclose(shift.double(), c, rtol=0, atol=1e-5) for c in candidates)


def test_groups_of_a_timestep_that_rises_while_noise_falls(case):
    """As Z-Image and Lumina2 are told theirs: the noisiest call has the lowest one."""
    stats = copy.copy(case.stats)
    stats.timesteps = stats.timesteps[::-1]
    stats._rows = {name: rows.flip(0) for name, rows in stats._rows.items()}
    choices = {"method": "htg", "num_groups": 2, "attention": "none", "activations": "static"}
    plan = make_plan(case.model, stats, inputs=case.batch, **choices)
    packed = convert(case.model, plan, stats, quiet=True, inputs=case.batch)
    truth, ours = run(case.model, case.batch), run(packed, case.batch)
    assert 0 < float((ours - truth).norm() / truth.norm()) < 0.06
    state, checked = packed.state_dict(), 0
    for site in plan.sites:
        block, _, name = site.name.rpartition(".")
        shift = state.get(f"{block}.ditq_sites.{name}.shift")
        if shift is None or len(shift) < 2:
            continue
        (bound,) = state[f"{block}.timestep_groups.bounds"]
        low, high = (side.double() for side in stats.ranges(site.name))
        under = torch.tensor(stats.timesteps) < bound
        for group, of in enumerate((under, ~under)):  # by rising timestep
            expected = ((low + high) / 2)[of].mean(0)
            torch.testing.assert_close(shift[group].double(), expected, rtol=0, atol=1e-5)
            checked += 1
    assert checked >= 8


def test_an_attention_that_adds_values_of_its_own_is_refused_where_v_carries_a_fold(case):
    """As an IP-Adapter does, before the output projection that expects the factor."""
    plan = make_plan(case.model, case.stats, inputs=case.batch, method="smoothquant")
    packed = convert(case.model, plan, case.stats, quiet=True, inputs=case.batch)
    folded = [site.name for site in plan.sites if site.place == "value"]
    assert bool(folded) != ("Lumina2" in plan.architecture)  # whose heads share their V
    expected = run(packed, case.batch)
    for name in folded:
        attention = packed.get_submodule(name.rpartition(".")[0])
        attention = attention.get_submodule(name.rpartition(".")[2].partition("_")[0])
        stock = attention.processor
        attention.processor = type("Adds", (type(stock),), {})()
        with pytest.raises(ValueError, match=r": its processor is a Adds, and a factor was folded"):
            run(packed, case.batch)
        attention.processor = stock
    assert torch.equal(run(packed, case.batch), expected)


def test_what_is_behind_an_activation_is_left_alone_by_the_papers(case):
    plan = make_plan(case.model, inputs=case.batch, method="htg")
    alone = [site for site in plan.sites if site.method == "linear"]
    assert all("which no factor passes through" in site.reason for site in alone)
    assert len(alone) == (2 if "CogVideoX" in plan.architecture else 0)


def test_a_method_over_time_needs_a_timestep(case, monkeypatch):
    found = replace(
        family_for(case.model),
        timestep_argument=None,
        why_no_timestep="several arguments of its forward are timesteps: a, b",
    )
    monkeypatch.setattr(make, "family_or_row", lambda model, inputs: found)
    with pytest.raises(ValueError, match="method htg follows the timestep, and several arguments"):
        make_plan(case.model, method="htg")
    plan = make_plan(case.model, method="smoothquant")
    assert {site.shifts for site in plan.sites} <= {"none", "constant"}


def test_attention_whose_processor_is_recognised_runs_quantized_where_asked():
    tiny = CLASSES["LatteTransformer3DModel"]
    model = tiny.build().eval().requires_grad_(False)
    batch = tiny.inputs(model)
    plan = make_plan(model, inputs=batch, method="linear", attention="int8")
    assert [entry.values for entry in plan.attention] == ["int8"] * 6
    packed = convert(model, plan, quiet=True, inputs=batch)
    truth, ours = run(model, batch), run(packed, batch)
    assert (
        0 < float((ours - truth).norm() / truth.norm()) < 0.03
    )  # as W8A8, whose operands have 8 bits too
    assert execution_report(packed, batch).totals["integer_attentions"] == 6
    default = make_plan(model, inputs=batch, method="ptq4dit").attention
    assert all("masks are of keys alone" in entry.reason for entry in default)

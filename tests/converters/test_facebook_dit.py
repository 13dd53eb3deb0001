"""Checkpoints of DiT's own code: against an independent re-computation of the published model, in fp64."""

import argparse
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel

from ditq_converters import Recipe, convert, open_model
from ditq_converters.models.facebook_dit import open_facebook_dit
from ditq_runtime.layers.timestep_freq import get_timestep_freq, set_timestep_freq

D, DEPTH, HEADS, P, C, S, CLASSES = 384, 2, 6, 2, 4, 8, 1000


def _positions(size):
    """Fixed two-dimensional sines and cosines, width first (MAE's code, which DiT uses)."""
    omega = 1 / 10000 ** (np.arange(D // 4) / (D / 4))
    rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    parts = [np.outer(p.ravel(), omega) for p in (columns, rows)]
    return torch.from_numpy(np.concatenate([f(p) for p in parts for f in (np.sin, np.cos)], 1))[
        None
    ]


@pytest.fixture(scope="module")
def state():
    """A random DiT-S/2 of depth 2 with 8 x 8 latents, under the names of DiT's own code."""
    g = torch.Generator().manual_seed(0)

    def linear(out, *inputs, gain=1.0):
        weight = torch.randn(out, *inputs, generator=g) * gain / math.prod(inputs) ** 0.5
        return {"weight": weight, "bias": 0.1 * torch.randn(out, generator=g)}

    modules = {
        "x_embedder.proj": linear(D, C, P, P),
        "t_embedder.mlp.0": linear(D, 256),
        "t_embedder.mlp.2": linear(D, D),
        "y_embedder.embedding_table": {"weight": 0.3 * torch.randn(CLASSES + 1, D, generator=g)},
        "final_layer.linear": linear(P * P * 2 * C, D),
        "final_layer.adaLN_modulation.1": linear(2 * D, D),
    }
    for i in range(DEPTH):
        modules |= {
            f"blocks.{i}.attn.qkv": linear(3 * D, D),
            f"blocks.{i}.attn.proj": linear(D, D),
            f"blocks.{i}.mlp.fc1": linear(4 * D, D),
            f"blocks.{i}.mlp.fc2": linear(D, 4 * D),
            f"blocks.{i}.adaLN_modulation.1": linear(6 * D, D),
        }
    tensors = {f"{m}.{f}": t for m, fields in modules.items() for f, t in fields.items()}
    return {**tensors, "pos_embed": _positions(S // P).float()}


def _published(state, x, t, y, divisor=128):
    """DiT's forward as its paper and code define it (arXiv:2212.09748), functional, fp64."""
    sd = {name: tensor.double() for name, tensor in state.items()}

    def linear(h, name):
        return F.linear(h, sd[f"{name}.weight"], sd[f"{name}.bias"])

    def norm(h):
        return F.layer_norm(h, (D,), eps=1e-6)

    h = F.conv2d(x.double(), sd["x_embedder.proj.weight"], sd["x_embedder.proj.bias"], stride=P)
    h = h.flatten(2).transpose(1, 2) + _positions(S // P)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / divisor)
    angles = t.double()[:, None] * frequencies
    c = F.silu(linear(torch.cat([angles.cos(), angles.sin()], -1), "t_embedder.mlp.0"))
    c = linear(c, "t_embedder.mlp.2") + sd["y_embedder.embedding_table.weight"][y]
    for i in range(DEPTH):
        b = f"blocks.{i}"
        m = linear(F.silu(c), f"{b}.adaLN_modulation.1")[:, None].chunk(6, -1)
        qkv = linear(norm(h) * (1 + m[1]) + m[0], f"{b}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, HEADS, D // HEADS)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + m[2] * linear(a, f"{b}.attn.proj")
        f = F.gelu(linear(norm(h) * (1 + m[4]) + m[3], f"{b}.mlp.fc1"), approximate="tanh")
        h = h + m[5] * linear(f, f"{b}.mlp.fc2")
    shift, scale = linear(F.silu(c), "final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
    h = linear(norm(h) * (1 + scale) + shift, "final_layer.linear")
    n = S // P
    return h.reshape(-1, n, n, P, P, 2 * C).permute(0, 5, 1, 3, 2, 4).reshape(-1, 2 * C, S, S)


@pytest.fixture(scope="module")
def batch():
    x = torch.randn(4, C, S, S, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 20, 500, 999]), torch.tensor([1, 7, 999, 1000])


def _run(model, batch):
    x, t, y = batch
    with torch.no_grad():
        return model(x, timestep=t, class_labels=y).sample.double()


def _errors(got, expected):
    return ((got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).tolist()


@pytest.mark.parametrize("layout", ["plain", "training"])
def test_parity_with_the_published_model(state, batch, tmp_path, layout):
    path = tmp_path / "DiT-S-2.pt"
    noise = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    args = argparse.Namespace(model="DiT-S/2", lr=1e-4)
    training = {"model": noise, "ema": state, "opt": {"step": 3}, "args": args}
    torch.save(state if layout == "plain" else training, path)
    model = open_model(str(path))
    assert type(model) is DiTTransformer2DModel
    assert model.config.norm_eps == 1e-6
    expected = _published(state, *batch)
    # fp32 against fp64, a dozen layers deep; angles up to 999 round by 3e-5 in fp32
    assert max(_errors(_run(model, batch), expected)) < 5e-5


def test_the_two_frequency_tables_differ_and_both_are_kept(state, batch, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    for mode, divisor in (("dit", 128), ("diffusers", 127)):
        model = open_facebook_dit(tmp_path / "a.pt", timestep_freq=mode)
        assert max(_errors(_run(model, batch), _published(state, *batch, divisor))) < 5e-5
        assert get_timestep_freq(model) == mode
        out = tmp_path / mode
        packed = convert(model, Recipe("linear", "w8", "token"), out=out, quiet=True)
        stored = json.loads((out / "config.json").read_text())["quantization_config"]["scheme"]
        assert stored["timestep_freq"] == mode
        again = DiTTransformer2DModel.from_pretrained(out)
        assert get_timestep_freq(again) == mode
        assert torch.equal(_run(again, batch), _run(packed, batch))
        again.save_pretrained(tmp_path / f"{mode}-again")
        saved = DiTTransformer2DModel.from_pretrained(tmp_path / f"{mode}-again")
        assert torch.equal(_run(saved, batch), _run(again, batch))
    other = _errors(_published(state, *batch, 127), _published(state, *batch, 128))
    assert other[0] == 0  # at t = 0 all angles are 0
    assert other[3] > 1e-3


def test_another_dtype_and_unknown_sizes(state, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    assert open_facebook_dit(tmp_path / "a.pt", torch.bfloat16).dtype == torch.bfloat16
    model = open_facebook_dit(tmp_path / "a.pt", num_heads=4)
    assert (model.config.num_attention_heads, model.config.attention_head_dim) == (4, 96)
    with pytest.raises(ValueError, match="a divisor of it"):
        open_facebook_dit(tmp_path / "a.pt", num_heads=5)


class Harmful:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, r"extra\.weight is unknown"),
        (lambda s: {k: v for k, v in s.items() if k != "pos_embed"}, "pos_embed is missing"),
        (
            lambda s: {k: v for k, v in s.items() if "fc1" not in k},
            r"ff\.net\.0\.proj.* is missing",
        ),
        (lambda s: {**s, "blocks.1.mlp.fc1.bias": torch.zeros(3)}, r"shape \[3\], \[1536\] expec"),
        (lambda s: {"ema": 3}, "expected a state dict of tensors"),
        (lambda s: [1], "expected a state dict of tensors"),
        (lambda s: {"x": Harmful()}, "without running code from it"),
    ],
)
def test_other_files_are_refused_by_name(state, tmp_path, capsys, change, sentence):
    torch.save(change(state), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=sentence):
        open_facebook_dit(tmp_path / "a.pt")
    assert "ran" not in capsys.readouterr().out


def test_a_bare_pickle_and_a_cut_file_are_refused(state, tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"x": Harmful()}, protocol=2))
    torch.save(state, tmp_path / "b.pt")
    (tmp_path / "b.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:5000])
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="without running code from it") as refused:
            open_facebook_dit(tmp_path / name)
        assert "weights_only" not in str(refused.value)  # torch's advice is to run it


def test_modes_that_do_not_exist_are_refused(make_dit):
    with pytest.raises(ValueError, match="one of diffusers, dit, got 'fb'"):
        set_timestep_freq(make_dit(), "fb")
    with pytest.raises(ValueError, match="is for DiTTransformer2DModel, not Linear"):
        set_timestep_freq(torch.nn.Linear(1, 1), "dit")


QKV = "blocks.0.attn.qkv.weight"
DAMAGE = {
    "a text": (lambda s: "text", "expected a state dict of tensors by name"),
    "nothing": (lambda s: {}, "is missing"),
    "integer keys": (lambda s: {1: s[QKV]}, "expected a state dict of tensors by name"),
    "a key that is too far": (
        lambda s: s | {"blocks.999999.attn.qkv.weight": s[QKV].clone()},
        "holds weights of block 999999, but none of block 2",
    ),
    "another key": (lambda s: s | {"blocks.1234567890.x": s[QKV].clone()}, "is unknown"),
    "another rank": (
        lambda s: s | {"x_embedder.proj.weight": s[QKV].clone()},
        "4 dimensions expected",
    ),
    "no rows": (lambda s: s | {QKV: s[QKV][:0]}, "2 dimensions expected"),
    "a qkv of two": (
        lambda s: s | {"blocks.1.attn.qkv.weight": s[QKV][:2]},
        r"blocks\.1\.attn\.qkv\.weight: \[1152, 384\] expected, got \[2, 384\]",
    ),
    "a bias of two": (
        lambda s: s | {"blocks.0.attn.qkv.bias": torch.zeros(2)},
        "is missing|is unknown",
    ),
    "a view without strides": (
        lambda s: s | {QKV: torch.zeros(1).expand(2**30, 2**10)},
        "more than the file has bytes for",
    ),
    "integers": (lambda s: s | {QKV: s[QKV].int()}, "is torch.int32, float32"),
    "complex": (lambda s: s | {QKV: s[QKV].to(torch.complex64)}, "is torch.complex64"),
    "sparse": (lambda s: s | {QKV: s[QKV].to_sparse()}, "a plain tensor expected"),
    "NaN": (lambda s: s | {QKV: s[QKV] * float("nan")}, "not finite"),
    "other positions": (lambda s: s | {"pos_embed": s["pos_embed"].flip(1)}, "not the fixed sines"),
    "positions of a rectangle": (lambda s: s | {"pos_embed": s["pos_embed"][:, :15]}, "square"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(state, tmp_path, name):
    damage, sentence = DAMAGE[name]
    torch.save(damage(dict(state)), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=sentence):
        open_facebook_dit(tmp_path / "dit.pt")


def test_what_is_no_checkpoint_file_is_refused(state, tmp_path):
    torch.save(dict(state), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for content in (b"", b"hello", whole[:1000], whole[: len(whole) // 2]):
        (tmp_path / "dit.pt").write_bytes(content)
        with pytest.raises(ValueError, match="not a checkpoint that can be read"):
            open_facebook_dit(tmp_path / "dit.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for place in (tmp_path / "pipe.pt", tmp_path):  # reading the first would wait for ever
        with pytest.raises(ValueError, match="not a file"):
            open_facebook_dit(place)

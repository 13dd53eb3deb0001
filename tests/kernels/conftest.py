"""Where kernels run in these tests: on the GPU if there is one, else interpreted on the CPU."""

import os

import pytest
import torch

ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"  # tests/conftest.py decides


def pytest_configure(config):
    # Triton 3.6's interpreter takes range() over one-element arrays, which numpy 2.4 will refuse
    config.addinivalue_line(
        "filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
    )


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="no CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(skip)


@pytest.fixture
def device():
    """Device of kernel launches."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def generator():
    """Seeded randomness."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty returns NaN, or the largest-magnitude integer, so that an unwritten output shows."""
    empty = torch.empty

    def poisoned_empty(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)

    monkeypatch.setattr(torch, "empty", poisoned_empty)


@pytest.fixture(autouse=True)
def exact_bf16_in_the_interpreter(monkeypatch):
    """Triton 3.6 interprets fp32 -> bf16 wrongly (ties away from zero, lost mantissa carries)."""
    if ON_GPU:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            bits = torch.from_numpy(values.copy()).bfloat16().view(torch.int16)
            return bits.numpy().view("uint16")
        return convert(values, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def attention_problem():
    """A function that builds arguments of both attention ops, by name."""

    def build(queries, keys, head_dim, generator, scales="per_token", mask=True, batch=2, heads=2):
        """Keyword arguments of both ops; logits deviate by about 1, values by 1 around 0.5."""
        shape = {"static": (1,), "per_head": (heads,)}
        factor = 0.8 + 0.4 * torch.rand(2, batch, heads, max(queries, keys), generator=generator)
        factor *= 1 / 74  # deviation of uniform int8 codes
        q_scale, k_scale = factor[0, ..., :queries].contiguous(), factor[1, ..., :keys].contiguous()
        if scales != "per_token":
            q_scale, k_scale = (s.flatten()[: shape[scales][0]].clone() for s in (q_scale, k_scale))
        key_mask = torch.rand(batch, keys, generator=generator) < 0.7
        key_mask[:, 0] = True
        values = torch.randn(batch, heads, keys, head_dim, generator=generator) + 0.5
        per_head = heads if scales != "static" else 1
        return {
            "q": _codes((batch, heads, queries, head_dim), generator),
            "k": _codes((batch, heads, keys, head_dim), generator),
            "v": _codes((batch, heads, keys, head_dim), generator),
            "values": values.bfloat16(),
            "q_scale": q_scale,
            "k_scale": k_scale,
            "v_scale": torch.rand(per_head, generator=generator) / 74 + 0.01,
            "v_zero_point": torch.randint(-128, 128, (per_head,), generator=generator).int(),
            "softmax_scale": head_dim**-0.5,
            "key_mask": key_mask if mask else None,
        }

    return build


def _codes(shape, generator):
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)

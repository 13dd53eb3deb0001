"""Float attention of fused blocks: the bits of diffusers' processor in fewer operators; when torch's attention runs."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

from ditq_runtime.attention.dispatcher import asks_for_torch
from ditq_runtime.families.float_streams import attend_flux

TOKENS, HEADS, DIM = 7, 3, 32
NORMS = [("norm_added_q", "norm_added_k"), ("norm_q", "norm_k")]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tables(dtype=torch.float32, tokens=TOKENS):
    """A column for each channel, unlike for the two of a pair."""
    return tuple(randn(tokens, DIM, seed=seed).to(dtype) for seed in (8, 9))


@pytest.fixture
def attn():
    made = FluxAttention(
        query_dim=HEADS * DIM, heads=HEADS, dim_head=DIM, added_kv_proj_dim=HEADS * DIM,
        processor=FluxAttnProcessor(),
    )  # fmt: skip
    for seed, names in enumerate(NORMS):
        for name in names:
            getattr(made, name).weight.data = 1 + randn(DIM, seed=seed)
    return made.requires_grad_(False)


def heads_of(streams, dtype):
    """Q, K and V of streams with 3 and 4 tokens, or of one with 7."""
    sizes = (3, 4) if streams == 2 else (TOKENS,)
    return [
        [randn(2, size, HEADS, DIM, seed=10 * i + j).to(dtype) for j in range(3)]
        for i, size in enumerate(sizes)
    ]


def stock(attn, heads, names, rotation):
    """What FluxAttnProcessor does between its projections, written out."""
    q, k, v = (
        torch.cat([getattr(attn, one[i])(made[i]) if i < 2 else made[i]
                   for made, one in zip(heads, names, strict=True)], 1)
        for i in range(3)
    )  # fmt: skip
    if rotation is not None:
        q, k = (apply_rotary_emb(x, rotation, sequence_dim=1) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("rotation", [None, torch.float32, torch.float64, torch.bfloat16])
def test_it_has_the_bits_of_diffusers_processor(attn, dtype, streams, rotation):
    attn.to(dtype)
    heads, names = heads_of(streams, dtype), NORMS[-streams:]
    tensors = None if rotation is None else tables(rotation)
    made = attend_flux(attn, list(zip(heads, names, strict=True)), tensors)
    assert made.dtype == dtype
    assert torch.equal(made, stock(attn, heads, names, tensors))


def test_a_table_is_read_again_after_it_changed(attn):
    """Also in inference mode, where nobody counts changes."""
    heads, cos_sin = heads_of(1, torch.float32), tables()
    streams = [(heads[0], NORMS[1])]
    before = attend_flux(attn, streams, cos_sin)
    assert torch.equal(attend_flux(attn, streams, cos_sin), before)
    cos_sin[1].mul_(2)
    after = attend_flux(attn, streams, cos_sin)
    assert not torch.equal(after, before)
    assert torch.equal(after, stock(attn, heads, NORMS[1:], cos_sin))
    with torch.inference_mode():
        cos_sin = tables()
        assert torch.equal(attend_flux(attn, streams, cos_sin), before)
        cos_sin[1].mul_(2)
        assert torch.equal(attend_flux(attn, streams, cos_sin), after)


def test_a_hook_on_a_norm_is_called(attn):
    streams = [(heads_of(1, torch.float32)[0], NORMS[1])]
    plain = attend_flux(attn, streams, tables())
    attn.norm_q.register_forward_hook(lambda module, args, output: 2 * output)
    assert not torch.equal(attend_flux(attn, streams, tables()), plain)


def test_other_backends_are_asked_through_the_dispatcher(attn):
    assert asks_for_torch(attn.processor)
    with attention_backend("_native_math"):
        assert not asks_for_torch(attn.processor)
    for name, expected in (("native", True), ("ditq_int8", False)):
        attn.processor._attention_backend = name
        assert asks_for_torch(attn.processor) is expected
    attn.processor._attention_backend = None
    attn.processor._parallel_config = object()
    assert not asks_for_torch(attn.processor)
    streams = [(heads_of(1, torch.float32)[0], NORMS[1])]
    attn.processor._parallel_config, attn.processor._attention_backend = None, "ditq_int8"
    quantized = attend_flux(attn, streams, tables())
    attn.processor._attention_backend = None
    assert not torch.equal(quantized, attend_flux(attn, streams, tables()))

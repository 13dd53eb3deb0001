"""The report's attention rows, and what makes it fail: a replaced processor, lost scales, another op, no op."""

import json

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from ditq_runtime import FallbackError, configure, execution_report
from ditq_runtime.attention.processor import QuantAttnProcessor

D, TOKENS, BLOCKS, HEADS = 64, 16, 2, 2
ATTENTION = "transformer_blocks.0.attn1"
FLOPS = 4 * TOKENS * TOKENS * D  # two products of T x T x D multiply-adds

ROWS = {  # recipe -> op, scores, values, scales, bytes
    "attention_static": (
        "attention_qk_int8_pv_int8", "int8", "int8", "static", 3 * HEADS * 4,
    ),
    "attention_token": (
        "quantize_heads + attention_qk_int8_pv_bf16", "int8", "bf16", "token", 0,
    ),
}  # fmt: skip


@pytest.fixture
def model(packed_folder, load):
    """A transformer with quantized attention that a test may spoil."""
    return load(packed_folder("attention_static"))


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_quantized_attention(packed_folder, load, name):
    report = execution_report(load(packed_folder(name)))
    assert [row.name for row in report.attention] == [
        f"transformer_blocks.{i}.attn1" for i in range(BLOCKS)
    ]
    for row in report.attention:
        assert (row.op, row.scores, row.values, row.scales, row.nbytes) == ROWS[name]
        assert (row.flops, row.backend, row.integer, row.note) == (FLOPS, "reference", True, "")
    totals = report.totals
    assert (totals["attentions"], totals["integer_attentions"]) == (BLOCKS, BLOCKS)
    assert totals["integer_linears"] == 12  # its linears are reported as before
    assert totals["bytes"] == sum(r.nbytes for r in [*report.layers, *report.attention])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_attention_is_reported_as_float(packed_folder, load, dtype):
    report = execution_report(load(packed_folder("w8_static"), dtype=dtype))
    assert report.totals["integer_attentions"] == 0
    assert len(report.attention) == BLOCKS
    for row in report.attention:
        assert "scaled_dot_product" in row.op
        assert row.scores == row.values == str(dtype).removeprefix("torch.")
        assert (row.flops, row.backend, row.integer) == (FLOPS, "torch", False)
        assert "the scheme does not list it" in row.note


def test_it_prints_and_is_json(model):
    report = execution_report(model)
    lines = str(report).splitlines()
    assert lines[-2].startswith("transformer_blocks.1.attn1 ")
    assert "attention_qk_int8_pv_int8" in lines[-2]
    assert "2 of 2 attentions in integers" in lines[-1]
    stored = json.loads(json.dumps(report.to_dict()))
    assert [row["scores"] for row in stored["attention"]] == ["int8", "int8"]


@pytest.mark.parametrize("processor", [AttnProcessor2_0(), AttnProcessor()])
def test_a_replaced_processor_is_a_fallback(model, processor):
    model.transformer_blocks[0].attn1.set_processor(processor)
    with pytest.raises(
        FallbackError, match=rf"{ATTENTION}: .*its processor is a {type(processor).__name__}; load"
    ):
        execution_report(model)


def test_a_processor_of_another_class_is_a_fallback(model):
    class Other(QuantAttnProcessor):
        pass

    model.transformer_blocks[1].attn1.set_processor(Other())
    with pytest.raises(FallbackError, match=r"transformer_blocks\.1\.attn1: .*is a Other"):
        execution_report(model)


def test_lost_scales_are_a_fallback(model):
    model.transformer_blocks[0].attn1.core = torch.nn.Identity()
    with pytest.raises(FallbackError, match=rf"{ATTENTION}\.core: is gone"):
        execution_report(model)


def _sdpa(query, key, value, mask):
    by_head = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*by_head).transpose(1, 2)


def _bmm(query, key, value, mask):
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * 32**-0.5
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(3), value)


def _nothing(query, key, value, mask):
    return value


@pytest.mark.parametrize(
    ("bypass", "in_block", "ran"),
    [
        (_sdpa, "_scaled_dot_product", "_scaled_dot_product"),
        (_bmm, "bmm", "bmm"),
        (_nothing, r"gemm_w8a8 \+ ditq\.quantize_static \+ ditq\.gemm_residual", "nothing"),
    ],
)
def test_a_bypassed_op_is_a_fallback(model, monkeypatch, bypass, in_block, ran):
    """In a block that runs fused too, which may be held to more steps."""
    monkeypatch.setattr(model.transformer_blocks[0].attn1.core, "forward", bypass)
    with pytest.raises(
        FallbackError, match=rf"blocks\.0: fused, expected .*pv_int8 .*, but .*{in_block}"
    ):
        execution_report(model)
    configure(model, fuse=False)
    with pytest.raises(
        FallbackError,
        match=rf"{ATTENTION}: expected ditq\.quantize_heads \+ .*pv_int8, but .*{ran}",
    ):
        execution_report(model)


def test_both_ops_side_by_side_are_a_fallback(model, monkeypatch):
    core = model.transformer_blocks[0].attn1.core
    real = type(core).forward

    def both(*operands):
        return real(core, *operands) + 0 * _sdpa(*operands)

    monkeypatch.setattr(core, "forward", both)
    for fuse, where in ((True, r"blocks\.0: fused"), (False, ATTENTION)):
        configure(model, fuse=fuse)
        with pytest.raises(FallbackError, match=rf"{where}.* expected .*_scaled_dot_product"):
            execution_report(model)


def test_another_format_than_the_scheme_says_is_a_fallback(packed_folder, load, model):
    other = load(packed_folder("attention_token")).transformer_blocks[0].attn1.core
    model.transformer_blocks[0].attn1.core = other
    with pytest.raises(
        FallbackError,
        match=r"but .*attention_qk_int8_pv_bf16 ran",
    ):
        execution_report(model)


def test_hooks_are_removed(model):
    def hooks():
        return [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]

    before = hooks()
    execution_report(model)
    assert hooks() == before

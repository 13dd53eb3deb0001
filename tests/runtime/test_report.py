"""The execution report shows what ran, and fails when that is not what the scheme promises."""

import json

import pytest
import torch
from torch import nn

import ditq_kernels as k
import ditq_runtime as ditq
from ditq_kernels.launch import plans
from ditq_kernels.ops import dispatch
from ditq_runtime import FallbackError, QuantLinear, execution_report
from ditq_runtime.families.dit import example_inputs
from ditq_runtime.layers.site import Site

D, TOKENS, BLOCKS = 64, 16, 2
PRODUCTS = 4 * D * D + 2 * 4 * D * D  # multiply-adds of a token in the six linears of a block
INTEGER_FLOPS = BLOCKS * 2 * TOKENS * PRODUCTS
# one row an image: modulation and embedder of each block (the first embedder runs again for the final layer), then
# the final modulation; and the final projection of every token
FLOAT_FLOPS = 2 * (
    BLOCKS * 6 * D * D + (BLOCKS + 1) * (256 * D + D * D) + 2 * D * D + TOKENS * 4 * D
)
Q, FC2 = "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"

ROWS = {  # recipe -> (ops of to_q, its weights, its activations, ops of the modulation)
    "w8_static": ("quantize_static + gemm_w8a8", "w8", "int8 static", "linear_w8"),
    "w8_token": ("quantize_per_token + gemm_w8a8", "w8", "int8 token", "linear_w8"),
    "w4p_static": ("quantize_static + gemm_w4a8", "w4p", "int8 static", "linear_w4"),
    "w4p_token": ("quantize_per_token + gemm_w4a8", "w4p", "int8 token", "linear_w8"),
}


@pytest.fixture
def model(packed_folder, load):
    """A packed transformer that a test may spoil."""
    return load(packed_folder("w8_static"))


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_every_format(packed_folder, load, name):
    model = load(packed_folder(name))
    ditq.configure(model, fuse=False)
    report = execution_report(model)
    rows = {row.name: row for row in report.layers}
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(rows) == linears
    assert len(rows) == len(report.layers)

    op, weights, activations, modulation_op = ROWS[name]
    row = rows[Q]
    assert (row.op, row.weights, row.activations) == (op, weights, activations)
    assert (row.backend, row.integer, row.note) == (k.backend_of("gemm_w8a8", "cpu"), True, "")
    assert row.flops == 2 * TOKENS * D * D
    modulation = rows["transformer_blocks.1.norm1.linear"]
    assert (modulation.op, modulation.integer, modulation.activations) == (
        modulation_op,
        False,
        "fp32",
    )
    assert "weight-only" in modulation.note
    assert modulation.flops == 2 * 6 * D * D
    kept = rows["proj_out_2"]
    assert (kept.backend, kept.weights, kept.integer) == ("torch", "float32", False)
    assert "kept float" in kept.note


def test_a_layer_kept_float_is_reported_as_float(packed_folder, load):
    report = execution_report(load(packed_folder("kept")))
    row = next(row for row in report.layers if row.name == Q)
    assert (row.weights, row.activations, row.integer) == ("float32", "float32", False)
    assert "--keep" in row.note
    assert report.totals["integer_linears"] == 10  # of the six in each block, to_q is kept


@pytest.mark.parametrize("name", ["w8_static", "w4p_token"])
def test_totals_are_the_hand_worked_ones(packed_folder, load, name):
    model = load(packed_folder(name))
    report = execution_report(model)
    totals = report.totals
    assert totals["integer_linears"] == 12
    assert totals["weight_only_linears"] == 3  # modulations: of two blocks, and of the last norm
    if name == "w8_static":
        assert totals["linears"] == 20  # 14, an embedder of two in each block, two at the end
        assert sum(row.flops for row in report.layers) == INTEGER_FLOPS + FLOAT_FLOPS
        assert totals["integer_flops_share"] == pytest.approx(
            INTEGER_FLOPS / (INTEGER_FLOPS + FLOAT_FLOPS), rel=1e-12
        )
    stored = sum(
        tensor.numel() * tensor.element_size()
        for module in model.modules()
        if isinstance(module, nn.Linear | Site)
        for tensor in module.parameters(recurse=False)
    )
    assert totals["bytes"] == stored


def test_bytes_of_a_layer_are_those_it_stores(packed_folder, load):
    rows = {row.name: row for row in execution_report(load(packed_folder("w4p_static"))).layers}
    inputs, outputs, groups = 4 * D, D, 4 * D // 32
    # nibbles, scale and offset of each group; fp32 or int32: weight_scale, weight_sum, bias; of its site smooth_inv
    # and two more
    expected = inputs * outputs // 2 + 2 * groups * outputs + 4 * (3 * outputs + inputs + 2)
    assert rows[FC2].nbytes == expected


def test_the_report_prints_and_is_json(model):
    report = execution_report(model)
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report.layers) + len(report.attention) + 1
    assert lines[0].split()[:3] == ["layer", "op", "weights"]
    for row, line in zip([*report.layers, *report.attention], lines[1:-1], strict=True):
        assert line.startswith(row.name)
        assert row.op in line
    share = 100 * report.totals["integer_flops_share"]
    assert lines[-1].startswith("12 of 20 linears in integers, 3 weight-only, ")
    assert f"{share:.1f} % of linear FLOPs" in lines[-1]
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["totals"] == report.totals
    assert [layer["name"] for layer in stored["layers"]] == [row.name for row in report.layers]


def hooks_of(model):
    """Of all modules; some belong to the checkpoint."""
    return [(*m._forward_hooks.items(), *m._forward_pre_hooks.items()) for m in model.modules()]


def test_given_inputs_are_used_and_nothing_stays_hooked(model):
    before = hooks_of(model)
    inputs = {**example_inputs(model)}
    inputs["hidden_states"] = inputs["hidden_states"].repeat(3, 1, 1, 1)
    inputs["timestep"], inputs["class_labels"] = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3])
    rows = {row.name: row for row in execution_report(model, inputs).layers}
    assert rows[Q].flops == 3 * 2 * TOKENS * D * D
    assert hooks_of(model) == before


@pytest.mark.filterwarnings("ignore:cross_attention_kwargs")
def test_attention_arguments_keep_a_block_unfused_and_the_report_says_so(model):
    """diffusers' processors ignore what they do not know; a fused block would have nobody to pass it to."""
    inputs = {**example_inputs(model), "cross_attention_kwargs": {"strength": 1.0}}
    plain, told = execution_report(model, example_inputs(model)), execution_report(model, inputs)
    assert plain.totals["fused_blocks"] == BLOCKS
    assert [row.note for row in told.blocks] == [
        "cross_attention_kwargs given to the model"
    ] * BLOCKS
    assert told.totals["integer_flops_share"] == plain.totals["integer_flops_share"]
    assert execution_report(model, {**inputs, "cross_attention_kwargs": {}}).totals == plain.totals


def test_hooks_are_removed_also_when_the_forward_fails(model, monkeypatch):
    before = hooks_of(model)

    def fail(x):
        raise ZeroDivisionError

    monkeypatch.setattr(model.get_submodule(Q), "forward", fail)
    with pytest.raises(ZeroDivisionError):
        execution_report(model)
    monkeypatch.undo()
    assert hooks_of(model) == before
    assert execution_report(model).totals["integer_linears"] == 12


def test_a_float_model_is_refused(build_model):
    with pytest.raises(ValueError, match="DiTTransformer2DModel is not a packed ditq transformer"):
        execution_report(build_model())


def _replace(model, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _float_twin(layer):
    linear = nn.Linear(layer.in_features, layer.out_features)
    linear.weight.data, linear.bias.data = layer.dequantized_weight().clone(), layer.bias.data
    return linear


class _Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, x):
        return self.inner(x)


class _Subclass(QuantLinear):
    pass


@pytest.mark.parametrize("name", [Q, FC2, "transformer_blocks.0.norm1.linear"])
def test_a_replaced_layer_is_a_fallback(model, name):
    _replace(model, name, _float_twin(model.get_submodule(name)))
    with pytest.raises(FallbackError, match=rf"{name}: the scheme promises .* has a Linear there"):
        execution_report(model)


def test_a_wrapped_layer_is_a_fallback(model):
    _replace(model, Q, _Wrapped(model.get_submodule(Q)))
    with pytest.raises(FallbackError, match=rf"{Q}: .*_Wrapped there"):
        execution_report(model)


def test_a_layer_of_another_class_is_a_fallback(model):
    model.get_submodule(Q).__class__ = _Subclass
    with pytest.raises(FallbackError, match=rf"{Q}: .*_Subclass there"):
        execution_report(model)


def test_a_layer_that_is_gone_is_a_fallback(model):
    model.transformer_blocks[0].attn1.to_out = nn.ModuleList([_Nothing(), nn.Identity()])
    with pytest.raises(FallbackError, match=r"transformer_blocks\.0\.attn1\.to_out\.0"):
        execution_report(model)
    model.transformer_blocks[0].attn1.to_out = nn.Identity()
    with pytest.raises(FallbackError, match=r"transformer_blocks\.0\.attn1\.to_out\.0"):
        execution_report(model)


class _Nothing(nn.Module):
    def forward(self, x):
        return x


BYPASSES = {
    "linear": lambda layer, x: nn.functional.linear(x, layer.dequantized_weight(), layer.bias),
    "matmul": lambda layer, x: x @ layer.dequantized_weight().t() + layer.bias,
    "elementwise": lambda layer, x: (
        (x[..., None, :] * layer.dequantized_weight()).sum(-1) + layer.bias
    ),
    "einsum": lambda layer, x: torch.einsum("btk,nk->btn", x, layer.dequantized_weight()),
    "both": lambda layer, x: (
        QuantLinear.forward(layer, x)
        + 0 * nn.functional.linear(x, layer.dequantized_weight(), layer.bias)
    ),
}


@pytest.mark.parametrize("kind", BYPASSES)
def test_a_bypassed_op_is_a_fallback(model, kind, monkeypatch):
    layer = model.get_submodule(Q)
    monkeypatch.setattr(layer, "forward", lambda x: BYPASSES[kind](layer, x))
    with pytest.raises(
        FallbackError, match=rf"{Q}: expected ditq\.quantize_static \+ ditq\.gemm_w8"
    ):
        execution_report(model)


def test_the_wrong_integer_op_is_a_fallback(packed_folder, load, monkeypatch):
    token = load(packed_folder("w8_token")).get_submodule(Q)
    model = load(packed_folder("w8_static"))
    monkeypatch.setattr(model.get_submodule(Q), "forward", token.forward)
    with pytest.raises(FallbackError, match=r"but ditq\.quantize_per_token"):
        execution_report(model)


def test_a_listed_layer_that_does_not_run_is_a_fallback(model, monkeypatch):
    monkeypatch.setattr(model.transformer_blocks[1].ff, "forward", lambda x: x)
    with pytest.raises(
        FallbackError, match=r"blocks\.1\.ff.*listed in the scheme, but no operator"
    ):
        execution_report(model)


def test_a_layer_whose_output_is_not_computed_is_a_fallback(model, monkeypatch):
    layer = model.get_submodule(Q)
    monkeypatch.setattr(layer, "forward", lambda x: torch.zeros_like(x))
    with pytest.raises(FallbackError, match=rf"{Q}: .*nothing ran"):
        execution_report(model)


def test_a_poisoned_plan_fails_the_report(model):
    """Where nobody watches, calls run plans: the report holds those that are kept to what the ops run."""
    inputs = example_inputs(model)
    with torch.no_grad():
        model(**inputs)
    execution_report(model, inputs)
    kept = [key for key in plans._plans if key[0] == "gemm_w8a8"]
    assert kept
    for key in kept:
        poison = plans.FunctionPlan(dispatch.quantize_per_token)
        plans._plans[key] = [one._replace(plan=poison) for one in plans._plans[key]]
    try:
        with pytest.raises(
            FallbackError, match=r"^\S+: the plan kept for gemm_w8a8 is FunctionPlan"
        ):
            execution_report(model, inputs)
    finally:
        plans.clear()

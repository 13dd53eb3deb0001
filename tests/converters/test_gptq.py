"""Error-compensating rounding: hand-worked, against a direct solver, and never worse on the rows it was given."""

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_converters import Recipe, StatisticsError, calibrate, convert
from ditq_converters.convert.fold import LinearTensors
from ditq_converters.convert.gptq import BLOCK, compensated_codes, error_feedback
from ditq_converters.convert.quantize import quantize_linear
from ditq_runtime import QuantLinear
from ditq_runtime.format.layer import LayerFormat

FORMATS = [LayerFormat("w8", "token"), *(LayerFormat(w, "token", 32) for w in ("w4p", "w4g"))]


class Integers:
    """Every value rounds to an integer."""

    def nearest(self, values, column):
        return values.round(), values.round()


def correlated(rows, inputs, seed=0):
    """Rows of a random low-rank mix plus noise, with an outlier channel; a few channels are silent."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, 12, generator=generator, dtype=torch.float64) @ mix
    x += 0.3 * torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    x[:, 5] *= 20
    x[:, 7:9] = 0
    return x


def weight_of(outputs, inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)


def test_two_columns_by_hand():
    """H = [[2, 1], [1, 2]]: of an error e in the first column, e / 2 goes to the second.

    (0.4, 0.4) -> first 0, error 0.4, so the second is 0.6 -> 1; nearest gives 0 and more output error:
    (0.4, 0.4) H (0.4, 0.4)^T = 0.96 against (0.4, -0.6) H (0.4, -0.6)^T = 0.56. (2.3, -1.2) -> 2, then -1.05 -> -1.
    """
    rows = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # X^T X = H
    codes = compensated_codes(
        torch.tensor([[0.4, 0.4], [2.3, -1.2]]), error_feedback(rows, 0.0), Integers()
    )
    assert codes.tolist() == [[0, 1], [2, -1]]


def test_the_factor_is_the_root_of_the_damped_inverse():
    rows = correlated(50, 30)
    found = error_feedback(rows, 0.03)
    factor, order = found.upper.numpy(), found.order.numpy()
    hessian = rows.numpy().T @ rows.numpy()
    hessian += 0.03 * np.trace(hessian) / 30 * np.eye(30)
    assert order[0] == 5  # the outlier channel
    assert np.array_equal(order, np.argsort(-np.diag(hessian), kind="stable"))
    hessian = hessian[order][:, order]
    assert np.array_equal(factor, np.triu(factor))
    # condition below 1e5, fp64
    np.testing.assert_allclose(factor.T @ factor @ hessian, np.eye(30), rtol=0, atol=1e-9)


@pytest.mark.parametrize("inputs", [11, BLOCK, BLOCK + 1, 2 * BLOCK + 9])
@pytest.mark.parametrize("ordered", [False, True])
def test_it_is_optimal_brain_surgery_column_by_column(inputs, ordered):
    """The oracle solves, after every column, for the best real values of all columns that are still free."""
    rows, weight = correlated(60, inputs), 3 * weight_of(4, inputs)
    feedback = error_feedback(rows, ordered=ordered)
    codes = compensated_codes(weight, feedback, Integers())
    hessian = rows.T @ rows
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(inputs)
    order = feedback.order.tolist()
    free, expected = weight.clone(), torch.empty(4, inputs, dtype=torch.float64)
    for place, column in enumerate(order):
        expected[:, column] = free[:, column].round()
        error, rest = free[:, column] - expected[:, column], order[place + 1 :]
        # least d H d^T with d[column] = -error: H[rest, rest] d[rest] = error H[rest, column]
        step = torch.linalg.solve(hessian[rest][:, rest], hessian[rest, column])
        free[:, rest] += torch.outer(error, step)
    assert torch.equal(codes, expected)


def test_importance_is_what_an_error_costs_behind_the_feedback():
    """Of real-valued later columns: |e|^2 times the Schur complement of H, from numpy; columns cost in their order."""
    rows = correlated(50, 30)
    feedback = error_feedback(rows, 0.03)
    order = feedback.order.numpy()
    hessian = rows.numpy().T @ rows.numpy()
    hessian = (hessian + 0.03 * np.trace(hessian) / 30 * np.eye(30))[order][:, order]
    cost = np.empty(30)
    for place, column in enumerate(order):
        later = slice(place + 1, None)
        cross = hessian[place, later]
        solved = np.linalg.solve(hessian[later, later], cross)
        cost[column] = hessian[place, place] - cross @ solved
    found = feedback.importance.numpy()
    np.testing.assert_allclose(found, cost / cost.mean(), rtol=1e-9)


def test_the_order_of_the_channels_does_not_matter():
    """By energy, so that permuting inputs and columns permutes the codes; distinct energies, one scale a row."""
    rows, weight = correlated(200, 40)[:, torch.arange(40) != 8], 3 * weight_of(6, 39)
    shuffle = torch.randperm(39, generator=torch.Generator().manual_seed(5))
    codes = compensated_codes(weight, error_feedback(rows), Integers())
    shuffled = compensated_codes(weight[:, shuffle], error_feedback(rows[:, shuffle]), Integers())
    assert torch.equal(shuffled, codes[:, shuffle])


def test_centred_rows_leave_the_mean_to_the_bias():
    """With a bias that takes back the mean error, what is left is the variance: centred rows leave less of it."""
    rows, weight = correlated(300, 64) + 4.0, 3 * weight_of(32, 64)

    def left(centred):
        codes = compensated_codes(weight, error_feedback(rows, centred=centred), Integers())
        error = rows @ (codes - weight).T
        return float((error - error.mean(0)).norm())

    assert left(True) < left(False)
    again = error_feedback(rows - rows.mean(0))
    assert torch.equal(error_feedback(rows, centred=True).upper, again.upper)


@pytest.mark.parametrize("layer_format", FORMATS)
def test_inputs_without_correlation_give_the_nearest_codes(layer_format):
    weight = weight_of(24, 160)
    weight[:, 9] *= 30
    source = LinearTensors(weight, torch.zeros(1, 24, dtype=torch.float64))
    diagonal = torch.diag(torch.linspace(0, 3, 160, dtype=torch.float64))
    nearest = quantize_linear(source, layer_format)
    compensated = quantize_linear(source, layer_format, error_feedback(diagonal))
    silent = quantize_linear(source, layer_format, error_feedback(0 * diagonal))
    for name, tensor in nearest.items():
        assert torch.equal(tensor, compensated[name]), name
        assert torch.equal(tensor, silent[name]), name


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("rows", [40, 400])  # fewer and more than inputs
@pytest.mark.parametrize("weights", ["w8", "w4p", "w4g"])
def test_the_output_error_on_the_rows_is_smaller_with_equal_scales(weights, rows, rank):
    x, weight = correlated(rows, 160), weight_of(48, 160)
    group = None if weights == "w8" else 32
    layer_format = LayerFormat(weights, "static", group, lora_rank=rank)
    source = LinearTensors(weight, torch.zeros(1, 48, dtype=torch.float64))
    errors, stored = [], []
    for feedback in (None, error_feedback(x)):
        tensors = quantize_linear(source, layer_format, feedback)
        layer = QuantLinear(160, 48, layer_format, device="cpu")
        layer.load_state_dict(tensors, assign=True)
        stands_for = layer.dequantized_weight().double()
        codes = layer.weight if weights == "w8" else None
        if rank:
            stands_for += tensors["lora_up"].double() @ tensors["lora_down"].double()
        errors.append(float((x @ (stands_for - weight).T).norm()))
        stored.append(tensors)
        if codes is not None:
            assert torch.equal(tensors["weight_sum"], codes.sum(1, dtype=torch.int32))
    assert errors[1] < 0.8 * errors[0]
    if not rank:  # with a branch the two round different rests
        scales = [name for name in stored[0] if "scale" in name or "offset" in name]
        assert scales
        assert all(torch.equal(stored[0][name], stored[1][name]) for name in scales)


@pytest.mark.parametrize("quantized", [
    lambda w: k.quantize_weight_w8(w), lambda w: k.quantize_weight_w4p(w, 32),
    lambda w: k.quantize_weight_w4g(w, 32), lambda w: k.quantize_weight_w4g(w, 32, True),
])  # fmt: skip
def test_a_grid_rounds_its_own_weight_to_its_own_codes(quantized):
    weight = weight_of(20, 96).float()
    weight[3] *= 50
    weight[:, 40] *= 9
    grid = quantized(weight)
    codes, real = zip(*(grid.nearest(weight[:, c], c) for c in range(96)), strict=True)
    again = grid.with_codes(torch.stack(codes, dim=1))
    assert torch.equal(again.expand(), grid.expand())
    assert torch.equal(torch.stack(real, dim=1), grid.dequantize())


@pytest.fixture(scope="module")
def model(make_dit):
    return make_dit(2)


@pytest.mark.parametrize("activations", ["token", "static"])
@pytest.mark.parametrize("method", ["linear", "smoothquant", "htg"])
def test_converted_layers_err_less_on_the_sampled_rows(model, method, activations, tmp_path):
    """The rows of a site through its linears: folded weights stand beside folded inputs."""
    stats = calibrate(model, tmp_path / "stats", steps=10, samples=2, rows=16, quiet=True)
    errors = {}
    for rounding in ("nearest", "gptq"):
        recipe = Recipe(method, "w4p", activations, 32, rounding=rounding, num_groups=1)
        packed = convert(model, recipe, stats, quiet=True)
        kept = packed.config.quantization_config.recipe["plan"]["linears"]
        assert kept["transformer_blocks.*.ff.net.2"].get("rounding", "nearest") == rounding
        block = packed.transformer_blocks[1]
        for site, name in (("qkv", "attn1.to_k"), ("fc1", "ff.net.0.proj"), ("fc2", "ff.net.2")):
            layer = block.get_submodule(name)
            u = torch.ones(1, dtype=torch.float64)
            z = torch.zeros(1, dtype=torch.float64)
            if site != "fc2":
                chunk = 0 if site == "qkv" else 3
                source = model.transformer_blocks[1].norm1.linear.bias.double()
                bias = block.norm1.linear.bias.double()
                rows = slice((chunk + 1) * 64, (chunk + 2) * 64)
                u = bias[rows] / (source[rows] + 1)
                rows = slice(chunk * 64, (chunk + 1) * 64)
                z = source[rows] - bias[rows] / u
            elif layer.site.smooth_inv is not None:
                u = layer.site.smooth_inv.double()
            x = (stats.rows(f"transformer_blocks.1.{site}")[0].double().flatten(0, 1) - z) * u
            true = model.transformer_blocks[1].get_submodule(name).weight.double() / u
            error = (x @ (layer.dequantized_weight().double() - true).T).norm()
            errors.setdefault(name, []).append(float(error))
    for name, (nearest, gptq) in errors.items():
        assert gptq < 0.95 * nearest, name


def test_modulations_are_rounded_by_their_exact_inputs(model, tmp_path):
    """What they read depends on timestep and class alone: the output error on what was recorded is smaller."""
    stats = calibrate(model, tmp_path / "stats", steps=8, samples=4, rows=4, quiet=True)
    name = "transformer_blocks.0.norm1.linear"
    rows, _ = stats.modulation(name)
    true = model.get_submodule(name).weight.double()
    errors = []
    for rounding in ("nearest", "gptq"):
        packed = convert(model, Recipe("linear", "w4p", rounding=rounding), stats, quiet=True)
        real = packed.get_submodule(name).dequantized_weight().double()
        errors.append(float((rows.double() @ (real - true).T).norm()))
    assert errors[1] < 0.7 * errors[0]


def test_it_needs_rows_and_says_so(model, tmp_path):
    recipe = Recipe("linear", rounding="gptq")
    with pytest.raises(ValueError, match=r"to_q: rounding gptq needs statistics"):
        convert(model, recipe, quiet=True)
    bare = calibrate(model, tmp_path / "stats", steps=2, samples=1, rows=0, quiet=True)
    with pytest.raises(StatisticsError, match=r"no sampled rows; calibrate .* --rows 64"):
        convert(model, recipe, bare, quiet=True)
